"""How a run samples: the section of its settings that evaluation follows too."""

from dataclasses import dataclass, replace

from diffexp_jax.limits import Number, check_text, setting, whole
from diffexp_jax.sampling import Noise
from diffexp_jax.sampling.flow import NOISES
from diffexp_jax.sampling.noise import ALL

GUIDANCE = Number(0.0, 100.0)  # 0 is unconditional, 1 none


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled, in training and evaluation."""

    steps: int = setting(50, "sampling steps, 1..1000", whole(1, 1000))
    guidance: float = setting(5.0, "classifier-free guidance scale w (Eq. 4); 1 is none", GUIDANCE)
    negative_prompt: str = setting(
        "",
        'what guidance leads away from, as in diffusers; "": from no prompt',
        check_text,
        about="""
        In training and evaluation. w of Eq. 4 weighs the prompt against it: 1 leaves it out, and a w_low of less than 1
        leads towards it. Eq. 8 still weighs words against "".
        """,
    )
    eta: float = setting(
        1.0,
        "noise of the sampling steps: 0 deterministic, 1 as in DDPM",
        Number(0.0, 10.0),
        about="""
        At most 1 for DDIM's steps (Stable Diffusion 1.x, 2.x, XL) and for sampling.noise="cps". Other rules of flow
        matching were published with the values at sampling.noise.
        """,
    )
    noise: str = setting(
        "sde",
        "the rule by which steps of flow matching (SD3, FLUX) add noise",
        tuple(NOISES),
        about="""
        "sde": Flow-GRPO's, published with eta 0.7. "dance": DanceGRPO's, 0.3. "cps": coefficients-preserving sampling,
        0.8. "precise": 1.5. The last two leave a noise of each step's own level, and none in the last; by strong "cps"
        images become more alike. DDIM has one rule: "sde".
        """,
    )
    noise_steps: tuple[int, int] = setting(
        ALL,
        "(first, end): steps that add noise, counted from 0 at the noise; the others are deterministic",
        whole(0, 1000, pair=True),
        about="""
        (0, steps - 1) leaves the last step without noise. Methods by log-probs learn from the steps with noise alone.
        """,
    )
    window: int = setting(
        0,
        "so many consecutive ones of them add noise, drawn anew each iteration; 0: all of them",
        whole(0, 1000),
        about="""
        Flow-GRPO-Fast: 3 of noise_steps=(0, 5), of ten steps. The update then costs three steps in place of ten.
        Evaluation adds noise at the first ones, unless `eval.eta` is 0.
        """,
    )

    @property
    def noise_rule(self) -> Noise:
        """Which steps add noise, and how."""
        return Noise(self.noise, self.noise_steps, self.window)

    def otherwise(self, *, steps: int | None, eta: float | None, guidance: float | None) -> "Sampling":
        """These with other steps, of which the same share adds noise, another eta or guidance; None: as it is."""
        steps, eta = self.steps if steps is None else steps, self.eta if eta is None else eta
        guidance = self.guidance if guidance is None else guidance
        noise = self.noise_rule if steps == self.steps else self.noise_rule.spread(self.steps, steps)
        return replace(self, steps=steps, eta=eta, guidance=guidance, noise_steps=noise.steps, window=noise.window)
