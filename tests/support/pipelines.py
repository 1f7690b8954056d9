"""Tiny pipelines that diffusers makes, of each family."""

from diffexp_jax.emoji.tokenizer import write_tokenizer

PROMPTS = ["a dog riding a bike", "an ant"]
SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SD15 |= {"set_alpha_to_one": False, "steps_offset": 1}
ATTENTION = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
ATTENTION |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
FAMILIES = {
    "sd15": (
        "StableDiffusionPipeline",
        dict(attention_head_dim=2, cross_attention_dim=16, **ATTENTION),
        [dict(hidden_size=16, hidden_act="quick_gelu")],
        dict(SD15),
    ),
    "sd2": (
        "StableDiffusionPipeline",
        dict(attention_head_dim=[1, 2], cross_attention_dim=24, use_linear_projection=True, **ATTENTION),
        [dict(hidden_size=24, hidden_act="gelu", projection_dim=10)],
        dict(SD15, prediction_type="v_prediction"),
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        dict(
            attention_head_dim=[1, 2],
            cross_attention_dim=40,
            transformer_layers_per_block=[1, 2],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=6 * 6 + 12,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        [dict(hidden_size=16, hidden_act="quick_gelu"), dict(hidden_size=24, hidden_act="gelu", projection_dim=12)],
        dict(SD15),
    ),
}


def tokenizers(folder, n):
    """As published: the second tokenizer differs by its padding."""
    from transformers import CLIPTokenizer

    write_tokenizer(folder)
    return [CLIPTokenizer.from_pretrained(folder, **({"pad_token": "!"} if i else {})) for i in range(n)]


def pipeline(name, folder):
    """diffusers' pipeline of random weights."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    kind, unet, text, scheduler = FAMILIES[name]
    tokens = tokenizers(folder, len(text))
    sizes = dict(intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32)
    sizes |= dict(vocab_size=len(tokens[0]), eos_token_id=tokens[0].eos_token_id, initializer_range=0.3)
    texts = [CLIPTextConfig(**sizes, **more) for more in text]
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **unet
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.5,
        ),
        "text_encoder": CLIPTextModel(texts[0]),
        "tokenizer": tokens[0],
        "scheduler": diffusers.DDIMScheduler(**scheduler),
    }  # fmt: skip
    with torch.no_grad():
        for parameter in [*parts["unet"].parameters(), *parts["vae"].parameters()]:
            parameter += 0.05 * torch.randn_like(parameter)
    if len(texts) > 1:
        return diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=CLIPTextModelWithProjection(texts[1]), tokenizer_2=tokens[1], add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
