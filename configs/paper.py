"""The settings of the DiffExp paper's experiments, one name each.

    python -m diffexp_jax.train --config configs/paper.py:fig4_ddpo_aesthetic --workdir runs/fig4_ddpo_aesthetic
    python -m diffexp_jax.train --config configs/paper.py:fig4_ddpo_aesthetic,explore=false --workdir runs/its_baseline
    python -m diffexp_jax.train --config configs/paper.py:sdxl_ddpo_pickscore --dry_run

What the copies of the paper that we could read give: Stable Diffusion 1.5 with LoRA, 50 steps, 64 images an iteration,
guidance 5.0 (DDPO) and 7.5 (AlignProp), the learning rates, the 3/4 rule, and which prompts go with which reward: the
45 animals with Aesthetic, the 45 x 3 animals with activities with PickScore, 58 prompts of DrawBench with an ensemble
of HPS, Aesthetic and PickScore. Not the numbers of exploration and of iterations: those are our defaults. Of its
figures we know that 1 is about prompts like "a dolphin riding a bike" that come without the bike, and 9b about the
threshold of Eq. 7; that 4 is the two rewards under both algorithms, and which algorithm the others use, is our guess.
The rest is named by what it does. SDXL's settings are those of SD 1.5, at 1024 pixels.

Memory by `--dry_run` in float32 on a CPU (its numbers, not a GPU's; bfloat16 halves the weights), GiB a device:
fig4_ddpo_aesthetic sampling 5.93, update 12.42; fig4_alignprop_aesthetic 21.19; sdxl_ddpo_pickscore sampling 19.22,
update 19.21; sdxl_alignprop_aesthetic 38.46. The others were not measured.

Weights and DrawBench cannot be shipped. They are looked for in `weights/` and `prompts/` of the current folder; other
places by `--config.model.path=`, `--config.reward=aesthetic:PATH`, `--config.prompts=FILE`.
"""

from configs import alignprop, ddpo

_REWARDS = {
    "aesthetic": "aesthetic:weights/aesthetic",
    "pickscore": "pickscore:weights/pickscore",
    "ensemble": "hpsv2:weights/hpsv2+aesthetic:weights/aesthetic+pickscore:weights/pickscore",
}
# reward: its prompts, and those that are only looked at (the same unseen animals, alone or with the activities)
_PROMPTS = {
    "aesthetic": ("animals", ("animals_unseen",)),
    "pickscore": ("animal_activities", ("animal_activities_unseen",)),
    "ensemble": ("prompts/drawbench_58.tsv", ("prompts/drawbench_58.tsv",)),
}
# name: (algorithm, model, reward, what else is set)
EXPERIMENTS = {
    "fig1": ("alignprop", "sd15", "pickscore", {}),
    "fig4_ddpo_aesthetic": ("ddpo", "sd15", "aesthetic", {}),
    "fig4_ddpo_pickscore": ("ddpo", "sd15", "pickscore", {}),
    "fig4_alignprop_aesthetic": ("alignprop", "sd15", "aesthetic", {}),
    "fig4_alignprop_pickscore": ("alignprop", "sd15", "pickscore", {}),
    "fig9b_t600": ("ddpo", "sd15", "aesthetic", {"exploration.t_thresh": 600}),
    "fig9b_t700": ("ddpo", "sd15", "aesthetic", {"exploration.t_thresh": 700}),
    "fig9b_t800": ("ddpo", "sd15", "aesthetic", {"exploration.t_thresh": 800}),
    "fig9b_t900": ("ddpo", "sd15", "aesthetic", {"exploration.t_thresh": 900}),
    "drawbench_ddpo": ("ddpo", "sd15", "ensemble", {}),
    "drawbench_alignprop": ("alignprop", "sd15", "ensemble", {}),
    "sdxl_ddpo_aesthetic": ("ddpo", "sdxl", "aesthetic", {}),
    "sdxl_ddpo_pickscore": ("ddpo", "sdxl", "pickscore", {}),
    "sdxl_alignprop_aesthetic": ("alignprop", "sdxl", "aesthetic", {}),
    "sdxl_alignprop_pickscore": ("alignprop", "sdxl", "pickscore", {}),
}


def get_config(argument: str | None = None):
    """A name of EXPERIMENTS, with ",explore=false" for its baseline."""
    name, comma, explore = (argument or "").partition(",")
    if name not in EXPERIMENTS or (comma and explore not in ("explore=true", "explore=false")):
        accepted = f"{', '.join(EXPERIMENTS)}, each also with ,explore=false"
        raise ValueError(f"config argument {argument!r}: accepted: {accepted}")
    algorithm, model, reward, changes = EXPERIMENTS[name]
    module = {"ddpo": ddpo, "alignprop": alignprop}[algorithm]
    prompts, looked_at = _PROMPTS[reward]
    config = module.get_config(f"model={model},reward={_REWARDS[reward]},prompts={prompts},{explore or 'explore=true'}")
    config.eval.prompts = looked_at
    config.update_from_flattened_dict(changes)
    return config
