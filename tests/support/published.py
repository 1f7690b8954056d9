"""The configs of the published models."""

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(*kinds):
    """diffusers' block types of the levels, from fine to coarse."""
    return {
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
    }


SD15 = dict(
    act_fn="silu",
    attention_head_dim=8,
    block_out_channels=[320, 640, 1280, 1280],
    cross_attention_dim=768,
    **blocks(CROSS, CROSS, CROSS, PLAIN),
    in_channels=4,
    layers_per_block=2,
    norm_num_groups=32,
    out_channels=4,
    sample_size=64,
)
SDXL = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    attention_head_dim=[5, 10, 20],
    block_out_channels=[320, 640, 1280],
    cross_attention_dim=2048,
    **blocks(PLAIN, CROSS, CROSS),
    num_attention_heads=None,
    projection_class_embeddings_input_dim=2816,
    sample_size=128,
    transformer_layers_per_block=[1, 2, 10],
    use_linear_projection=True,
)


TEXT_L = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, vocab_size=49408)
TEXT_L |= dict(hidden_act="quick_gelu", max_position_embeddings=77, projection_dim=768, eos_token_id=2)
TEXT_G = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, vocab_size=49408)
TEXT_G |= dict(hidden_act="gelu", max_position_embeddings=77, projection_dim=1280, eos_token_id=2)
VAE = dict(block_out_channels=[128, 256, 512, 512], latent_channels=4, layers_per_block=2, norm_num_groups=32)
PUBLISHED = {
    "StableDiffusionPipeline": dict(unet=SD15, vae=VAE, text_encoder=TEXT_L, scheduler={}),
    "StableDiffusionXLPipeline": dict(
        unet=SDXL,
        vae=VAE | dict(scaling_factor=0.13025, force_upcast=True),
        text_encoder=TEXT_L,
        text_encoder_2=TEXT_G,
        scheduler={},
    ),
}
