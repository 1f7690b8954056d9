"""Every setting of a run, with its default, meaning and unit; the other configs start from `default()`.

Plain ml_collections: nothing in configs/ imports the package. Arguments choose structure (`arguments.py`); single
numbers are overridden by flags, e.g. `--config.optim.lr=3e-4`.

Written by tools/settings/write_base.py from the package, where each setting has its default, meaning and range in one
place (diffexp_jax/settings/, diffexp_jax/algorithms/): new ones are entered there.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def default() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0  # seed of everything random: same seed, same run
    # How to fine-tune: alignprop, ddpo, draft, dpok, prdp, rwr, nft, awm, entropy, seiko
    config.algorithm = placeholder(str)
    # Number of devices that a CPU counts as; None: one per core, as the batch and the memory allow
    config.cpu_devices = placeholder(int)
    # The paper gives no number. Exploration ends at three quarters of it (`exploration.fraction`): of 100 iterations of
    # 64 images, which are 6,400 reward queries, after 4,800.
    config.iterations = 100  # iterations of the run: each draws a batch of samples

    # The model that is fine-tuned, and what its networks compute in.
    config.model = ml_collections.ConfigDict()
    # "emoji", "emoji_hard", "emoji_flow" (shipped), a folder in diffusers' format, or of the hub: hub:ORG/NAME
    config.model.path = "emoji"
    config.model.revision = placeholder(str)  # branch, tag or commit of the hub's repository; None: its main branch
    # "fp16": take the half-precision weight files; None: the whole ones if there are any
    config.model.variant = placeholder(str)
    # A single file has none: a folder with CLIP's vocab.json and merges.txt, or hub:ORGANISATION/NAME; None: that of
    # the published model on the hub.
    config.model.tokenizer = placeholder(str)  # tokenizer's files, for a model that is a single file
    # "float32", "bfloat16", "float16", "auto" = bfloat16 on accelerators, float32 on a CPU. LoRA, latents, log-probs
    # and losses are float32 always, and so are SDXL's VAE and T5 in place of float16, in which they overflow.
    config.model.dtype = "auto"  # number type of the model's weights and networks
    # How an accelerator multiplies float32 matrices, by jax's names: "default" (TF32 on NVIDIA GPUs, one pass of
    # bfloat16 on TPUs), "bfloat16", "tensorfloat32", "float32" (in full), "auto" = in full where model.dtype is
    # float32.
    config.model.matmul_precision = "auto"  # precision of the networks' matrix products
    config.model.image_size = placeholder(int)  # pixels of an image's side; None: what the model was trained at
    # Of Stable Diffusion 3 and 3.5, published with 256 (most recipes for fine-tuning take 128), and of FLUX, 512.
    config.model.t5_tokens = placeholder(int)  # tokens that T5 reads of a prompt, its end included; None: as published
    # What the backward pass computes again instead of keeping, from fast to small: "none"; each sampling "step" (one
    # latent a step is kept); also each "block" of the network and of the VAE. DDPO's gradient is of one step at a time:
    # "none" is "step".
    config.model.remat = "step"  # "none", "step" or "block"
    # Of SDXL, SD 3 and FLUX, and of text encoders and rewards that are CLIPs, T5 or ImageReward. Such a program
    # compiles in a fraction of the time and computes the same, to rounding. A GPU copies a block's weights before it
    # multiplies with them, which takes longer with few images at once. "auto": for eight equal blocks or more, on TPUs,
    # and on GPUs that share out the weights (`parallel.shard_weights`).
    # Whether a program holds equal blocks of a network once, as a loop, instead of each of them
    config.model.scan_layers = "auto"

    # Overrides of the model's scheduler_config.json, by its names; None: as in the file.
    # A model that was saved with DPM++ or Euler may want timestep_spacing="leading", steps_offset=1,
    # set_alpha_to_one=False (docs/use/models.md).
    config.model.scheduler = ml_collections.ConfigDict()
    # "leading", "trailing" or "linspace": which timesteps are sampled
    config.model.scheduler.timestep_spacing = placeholder(str)
    config.model.scheduler.steps_offset = placeholder(int)  # number added to the timesteps of "leading"
    # False: the last step ends at the noise of timestep 0; True: at none
    config.model.scheduler.set_alpha_to_one = placeholder(bool)
    # "epsilon" or "v_prediction": what the network was trained to predict
    config.model.scheduler.prediction_type = placeholder(str)
    # True: the last timestep is pure noise (with "v_prediction")
    config.model.scheduler.rescale_betas_zero_snr = placeholder(bool)
    # False for a file whose "true" is not meant; "true" is not supported
    config.model.scheduler.clip_sample = placeholder(bool)
    config.model.scheduler.shift = placeholder(float)  # shift of flow matching's noise levels

    config.model.vae_slice = 32  # images that the VAE decodes at once, at most

    # A built-in set; a file (.txt, .csv, .tsv, .json); rows of one, FILE.csv:COLUMN=VALUE|VALUE; a single prompt: its
    # words, or prompt:TEXT, which may be one word.
    config.prompts = "animal_activities"  # prompts to fine-tune on
    # NAME, NAME:PATH, NAME:hub:ORG/NAME, textnorm(NAME:PATH), several joined by "+"; the user's own function:
    # jax:MODULE:FUNCTION or, for methods that need no gradient of it, python:MODULE:FUNCTION
    config.reward = "emoji_pickscore"  # reward that is maximised
    config.reward_weights = ()  # weights of the parts of a sum, in their order; (): those of DRaFT and PRDP
    config.reward_dtype = "float32"  # of the trained reward's networks: "float32", "bfloat16", "float16"

    # How a reward in plain Python is called: python:..., jpeg_compressibility.
    config.host_reward = ml_collections.ConfigDict()
    # Seconds that a call may take (on samples_per_forward images) before the run stops
    config.host_reward.timeout = 600.0
    config.host_reward.workers = 4  # threads that call the reward at once

    # Rewards that are written as textnorm(...), Kim et al. 2024.
    config.textnorm = ml_collections.ConfigDict()
    # Temperature of the softmax over prompts, in the reward's units (a cosine wants about 0.01)
    config.textnorm.temperature = 1.0
    # Json file {prompt: [contrastive prompts]}; None: swap animals and activities
    config.textnorm.contrast = placeholder(str)
    # Of reward="textnorm(A)+textnorm(B)+...": what the models disagree about is rewarded less (Kim et al. 2024).
    # Factor of the variance among several textnorm(...), subtracted from their mean; 0: their sum
    config.textnorm.uncertainty = 0.0

    # How many images an iteration draws, and how they are shared out.
    config.batch = ml_collections.ConfigDict()
    config.batch.samples = 64  # images an iteration, over all devices
    config.batch.samples_per_forward = 32  # images a device handles at once; smaller needs less memory
    config.batch.group = 1  # images of each prompt that an iteration draws: batch.samples / batch.group prompts

    # How images are sampled, in training and evaluation.
    config.sampling = ml_collections.ConfigDict()
    config.sampling.steps = 50  # sampling steps, 1..1000
    config.sampling.guidance = 5.0  # classifier-free guidance scale w (Eq. 4); 1 is none
    # In training and evaluation. w of Eq. 4 weighs the prompt against it: 1 leaves it out, and a w_low of less than 1
    # leads towards it. Eq. 8 still weighs words against "".
    config.sampling.negative_prompt = ""  # what guidance leads away from, as in diffusers; "": from no prompt
    # At most 1 for DDIM's steps (Stable Diffusion 1.x, 2.x, XL) and for sampling.noise="cps". Other rules of flow
    # matching were published with the values at sampling.noise.
    config.sampling.eta = 1.0  # noise of the sampling steps: 0 deterministic, 1 as in DDPM
    # "sde": Flow-GRPO's, published with eta 0.7. "dance": DanceGRPO's, 0.3. "cps": coefficients-preserving sampling,
    # 0.8. "precise": 1.5. The last two leave a noise of each step's own level, and none in the last; by strong "cps"
    # images become more alike. DDIM has one rule: "sde".
    config.sampling.noise = "sde"  # the rule by which steps of flow matching (SD3, FLUX) add noise
    # (0, steps - 1) leaves the last step without noise. Methods by log-probs learn from the steps with noise alone.
    # (first, end): steps that add noise, counted from 0 at the noise; the others are deterministic
    config.sampling.noise_steps = (0, 1000)
    # Flow-GRPO-Fast: 3 of noise_steps=(0, 5), of ten steps. The update then costs three steps in place of ten.
    # Evaluation adds noise at the first ones, unless `eval.eta` is 0.
    config.sampling.window = 0  # so many consecutive ones of them add noise, drawn anew each iteration; 0: all of them

    # DiffExp: Eq. 7 for the guidance of the steps, Eq. 8 for the weights of words.
    config.exploration = ml_collections.ConfigDict()
    config.exploration.enabled = True  # whether to explore; False: plain fine-tuning, bit for bit
    config.exploration.w_low = 1.0  # Eq. 7: guidance while t > t_thresh (the paper: "extremely low")
    config.exploration.t_thresh = 900  # Eq. 7: timestep above which guidance is low, 0..1000 (our choice)
    # "timestep": the model's own. "noise_level": 1000 s of x_t = c ((1 - s) x_0 + s eps), the same noise in all models;
    # Stable Diffusion's timesteps 900, 800, 700 and 600 are 893, 836, 769 and 696. "steps": the share of the sampling
    # steps to come, so 900 is the first tenth. Of ten steps of SD 3, which are denser at the noise, three are above
    # timestep 900.
    config.exploration.threshold_of = "timestep"  # what t_thresh is, of 1000
    config.exploration.weight_range = (1.0, 1.5)  # Eq. 8: range that the weight is drawn from (our choice)
    config.exploration.unit = "word"  # Eq. 8: what is weighted together: "word", "token" or "phrase"
    # Eq. 8: a draw for each "image", or for each "prompt", the same for its images of an iteration
    config.exploration.scope = "image"
    # The others have their prompt as it is, and are compared with the weighted ones. Eq. 7 guides all of them.
    # Eq. 8: share of an iteration's images, and of each group, whose prompt is weighted; 1 in the paper
    config.exploration.share = 1.0
    config.exploration.fraction = 0.75  # share of the iterations that explore, from the first; rounded up
    # A run that is continued with more iterations keeps the number that it began with, unless this says another.
    # Number of iterations that explore, from the first; None: by the fraction
    config.exploration.iterations = placeholder(int)

    # What is trained: low-rank updates of the network's layers.
    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 4  # rank of the update A B that is added to each layer that takes LoRA
    config.lora.alpha = 4.0  # scale of the update: alpha / rank
    # Of a UNet: "attention" (the four projections of each), "feed_forward", "projections" (proj_in and proj_out),
    # "convolutions" (of residual blocks and between levels). Of SD3's and FLUX's transformers: "attention" (of image
    # and prompt), "feed_forward", "modulation", SD3.5-medium's "second_attention". Or single layers of these by name:
    # "to_k", "attn.to_k".
    config.lora.targets = ("attention",)  # which layers take LoRA
    # A LoRA file or folder to start from (diffusers, peft, kohya); None: from nothing
    config.lora.path = placeholder(str)

    # The optimizer, AdamW.
    config.optim = ml_collections.ConfigDict()
    config.optim.lr = 3e-4  # learning rate
    # How the rate falls to 0 over the run's updates: "constant" (not at all), "linear", "cosine"
    config.optim.schedule = "constant"
    config.optim.warmup = 0  # optimizer updates over which the rate rises from 0, before the schedule; 0: none
    # Decay of a moving average of the LoRA, which evaluation, grids and exports then take; 0: none
    config.optim.ema = 0.0
    config.optim.b1 = 0.9  # decay of the gradient's running mean
    config.optim.b2 = 0.999  # decay of the gradient's running square
    config.optim.eps = 1e-8  # number added to the root of the running square
    config.optim.weight_decay = 1e-4  # weight decay, times lr, decoupled from the gradient
    config.optim.grad_clip = 1.0  # largest global norm of the gradient; a larger one is scaled down

    # AlignProp: the reward's gradient through the sampling chain (Prabhudesai et al. 2023).
    config.alignprop = ml_collections.ConfigDict()
    # Holds back what over-optimises the reward (Uehara et al. 2024a, b; SEIKO's code has 0.01 beside AlignProp's
    # coefficient of 0.01). It is a sum over the steps, a mean over a latent's numbers, and needs sampling.eta above 0.
    # A step then runs a second network, the untuned one.
    # Factor of the KL between the tuned and the untuned model's paths, in the loss; 0: none
    config.alignprop.kl_weight = 0.0
    # How many last steps carry gradient: "uniform", "per_step", "fixed"; "none": all
    config.alignprop.truncation = "uniform"
    config.alignprop.truncation_k = 1  # number of last steps for "fixed"
    # False: a step's gradient goes through the linear part of the later steps alone, as in DRTune (Wu et al. 2024).
    # Through ten or more networks a few samples' gradients blow up (docs/understand/methods/alignprop.md).
    config.alignprop.input_gradient = True  # whether the gradient goes through the later steps' networks, as published
    config.alignprop.loss_coefficient = 0.01  # factor of the loss
    # What rewards are pulled to: the loss is mean |target - r| for a number, mean(-r) for "none"; "auto" is 10 for the
    # aesthetic reward alone, as published, else "none".
    config.alignprop.reward_target = "auto"  # "auto", "none" or a number

    # DDPO: policy gradient with a clipped importance ratio (Black et al. 2024).
    config.ddpo = ml_collections.ConfigDict()
    config.ddpo.updates = 2  # optimizer updates an iteration, each on batch.samples / updates images
    config.ddpo.inner_epochs = 1  # passes over an iteration's samples
    config.ddpo.clip = 1e-4  # how far the importance ratio may be from 1
    # "sampled": the log-probs of the sampling program. "recomputed": the same by the update program, for one more
    # forward pass of all but the first update's samples. "current": each update's own, so that there is no ratio and no
    # clip. "auto": "sampled" in float32 on a CPU where the clip is at least 1e-5, else "recomputed"
    # (docs/understand/precision.md).
    config.ddpo.old_log_prob = "auto"  # what the importance ratio is relative to
    # 1: all, as published. DDIM's last but one step, to an image with hardly any noise left, has by far the largest
    # gradient and says least about the reward: the fewer the steps, the more so (docs/understand/methods/ddpo.md).
    # Share of the steps that add noise, from the first, that the update learns from
    config.ddpo.timestep_fraction = 1.0
    # "prompt": the mean and std of the prompt's newest rewards, as published. Of the batch.group samples of its prompt:
    # "group" their mean and std (GRPO), "group_mean" their mean and the std of all (Flow-GRPO), "loo" the mean of the
    # others (leave-one-out), unscaled.
    config.ddpo.advantage = "prompt"  # what a reward is compared with
    # As in Flow-GRPO (Liu et al. 2025): a mean over the steps, of means over a latent's numbers. Each update then
    # evaluates the untuned model too, and is made in two passes.
    config.ddpo.kl_weight = 0.0  # factor of each step's KL to the untuned model, in the loss; 0: none
    # Of flow matching it is then the distance of the two means without the step's dt in the noise's variance.
    config.ddpo.kl_by_length = False  # whether each step's KL is times the step's length, as in Flow-GRPO's code
    # A log-prob's gradient grows as its step's noise shrinks: each step's is divided by that factor. The loss is linear
    # in the log-ratio, up to ddpo.clip (a log-hinge). Made in two passes.
    config.ddpo.proportionate = False  # whether every step counts alike, as in PCPO (Lee and Ye 2025)
    # As in PODS (Xu et al. 2025): more images are sampled and scored than the update can afford. At least two are kept,
    # the lowest and the highest, and but for "prompt" compared with each other alone. Made in two passes.
    # Share of each prompt's batch.group images that are learnt from, those whose rewards vary most; 1: all
    config.ddpo.keep = 1.0
    config.ddpo.advantage_clip = 5.0  # largest advantage, in standard deviations
    config.ddpo.stats_buffer = 32  # newest rewards kept per prompt
    config.ddpo.stats_min_count = 16  # rewards of a prompt before its own mean and std are used
    # "onepass": each sample's gradient is made while it is sampled, for ddpo.updates = ddpo.inner_epochs = 1 alone: no
    # second pass of the network, no stored chains, but a gradient per sample. "twopass": after the rewards are known.
    # "auto": in one pass where an iteration is one update and the gradients take at most 2 GiB a device.
    config.ddpo.gradient = "auto"  # when the gradient is made

    # DRaFT: the reward's gradient through the last sampling steps (Clark et al. 2024).
    config.draft = ml_collections.ConfigDict()
    # Factor of the KL between the tuned and the untuned model's paths, in the loss; 0: none, see alignprop.kl_weight
    config.draft.kl_weight = 0.0
    config.draft.k = 1  # how many last steps carry gradient
    config.draft.lv_samples = 0  # DRaFT-LV (with k = 1): further noises of the last step, 2 in the paper; 0: DRaFT-K

    # DPOK: policy gradient with a penalty for leaving the untuned model (Fan et al. 2023).
    config.dpok = ml_collections.ConfigDict()
    config.dpok.updates = 2  # optimizer updates an iteration, each on batch.samples / updates images
    config.dpok.inner_epochs = 1  # passes over an iteration's samples
    config.dpok.clip = 1e-4  # how far the importance ratio may be from 1
    config.dpok.old_log_prob = "auto"  # what the importance ratio is relative to, see ddpo.old_log_prob
    # Share of the steps that add noise, from the first, that the update learns from, see ddpo.timestep_fraction
    config.dpok.timestep_fraction = 1.0
    config.dpok.reward_weight = 10.0  # factor of the policy gradient's loss
    config.dpok.kl_weight = 0.01  # factor of the penalty for leaving the untuned model
    config.dpok.value_baseline = True  # whether a value function is subtracted from the reward
    config.dpok.value_lr = 1e-4  # learning rate of the value function (AdamW, weight decay 0.01)
    config.dpok.value_steps = 1  # AdamW steps of the value function each iteration; published: one for 10 images
    # Minibatches of 256 random states that each gradient of the value function is the mean over
    config.dpok.value_batches = 5

    # PRDP: the log-ratios of a prompt's samples are made to differ as their rewards do (Deng et al. 2024).
    config.prdp = ml_collections.ConfigDict()
    config.prdp.updates = 1  # optimizer updates an epoch, each on whole prompts
    config.prdp.inner_epochs = 10  # passes over an iteration's samples; 10 with 45 prompts, 1 with 100,000 in the paper
    # How far a step's log-prob may move from the sampling policy's; 1e-4 with 100,000 prompts in the paper
    config.prdp.clip = 1e-6
    config.prdp.old_log_prob = "auto"  # what the importance ratio is relative to, see ddpo.old_log_prob
    # Share of the steps that add noise, from the first, that the update learns from, see ddpo.timestep_fraction
    config.prdp.timestep_fraction = 1.0
    # In the paper rewards are a cosine (HPSv2, PickScore without its factor), and beta is 3e-5 with 45 prompts, 3e-6
    # with 100,000. The log-ratios that it weighs are means over steps and a latent's numbers.
    config.prdp.beta = 3e-5  # weight of the KL to the untuned model, in the reward's units

    # RWR: reward-weighted likelihood of the model's own images (Lee et al. 2023; Black et al. 2024).
    config.rwr = ml_collections.ConfigDict()
    config.rwr.updates = 1  # optimizer updates in a pass, each on batch.samples / updates images
    config.rwr.inner_epochs = 5  # passes over an iteration's images, each at other timesteps and noise
    # False: of the output for the prompt alone, for half of the work; then guidance in sampling no longer fits what was
    # trained (Black et al. 2024, appendix E).
    # Whether the loss is of the guided output, with a gradient through both halves, as published
    config.rwr.guided = True
    # "exponential": exp(r / temperature) over its mean. "quantile": 1 for images at that quantile or above, else 0 (the
    # paper's sparse form), over its mean.
    config.rwr.weighting = "exponential"  # weight of an image by its reward: "exponential" or "quantile"
    # Published: an inverse temperature of 0.2, on LAION's aesthetic score and on kilobytes of JPEG. Other rewards have
    # other units; with `standardised` it is in standard deviations, and 1 is a good start.
    config.rwr.temperature = 5.0  # temperature of the exponential, in the reward's units
    config.rwr.standardised = False  # whether rewards are first divided by their iteration's standard deviation
    config.rwr.quantile = 0.9  # quantile from which an image counts, for "quantile"
    # Whether an image is weighed among those of its prompt (else among all of the iteration)
    config.rwr.per_prompt = True
    # Lee et al. take pretraining images. Those of the untuned model take their place, for twice the work.
    # Factor of the same loss on images of the untuned model (Lee et al. 2023's beta); 0: none are made
    config.rwr.prior_weight = 0.0

    # DiffusionNFT: towards good images and away from bad ones, on the forward process (Zheng et al. 2025).
    config.nft = ml_collections.ConfigDict()
    config.nft.updates = 1  # optimizer updates in a pass, each on batch.samples / updates images
    config.nft.inner_epochs = 1  # passes over an iteration's images, each at other timesteps and noise
    # False, as published: the output for the prompt alone, whatever guidance samples, for half of the work.
    config.nft.guided = False  # whether the guided output is what is trained
    # Share of the sampler's timesteps, drawn at random, at which each image is learnt
    config.nft.timestep_fraction = 0.99
    config.nft.strength = 1.0  # how far the two outputs lean towards the trained one and away from it: the paper's beta
    config.nft.advantage_clip = 5.0  # largest advantage, in standard deviations
    config.nft.global_std = True  # whether advantages are in all images' deviation (else the prompt's own)
    config.nft.kl_weight = 1e-4  # factor of |output - the untuned model's|^2 in the loss; 0: none
    # An epsilon model's error of x_0 is that of its output times sqrt((1 - alpha_bar) / alpha_bar), which is 13 at
    # Stable Diffusion's first step of 50 and 0.04 at its last. A flow model's is the noise level, at most 1.
    config.nft.weighting = "x_0"  # of noise levels, by the error of: "x_0", as published, or the network's "output"
    config.nft.old_start = 0  # optimizer updates up to which the sampling policy is the newest one
    config.nft.old_rate = 1e-3  # what each later update adds to the decay of the average
    # Published for most rewards: 0, 1e-3, 0.5. For text in images: 75, 7.5e-3, 0.999.
    config.nft.old_most = 0.5  # largest decay of the average

    # AWM: advantage-weighted matching, a policy gradient by the loss of pretraining (Xue et al. 2025).
    config.awm = ml_collections.ConfigDict()
    config.awm.updates = 1  # optimizer updates in a pass, each on batch.samples / updates images
    config.awm.inner_epochs = 1  # passes over an iteration's images, each at other timesteps and noise
    config.awm.guided = False  # whether the guided output is what is trained, see nft.guided
    # Noise levels at which each image is learnt, one of each of so many parts of the sampler's
    config.awm.timesteps = 6
    # Share of the sampler's steps, from the noise on, that noise levels are drawn from
    config.awm.timestep_fraction = 0.9
    config.awm.power = 0.25  # power of the squared error in the log-likelihood
    config.awm.clip = 1.0  # how far the importance ratio may be from 1, of several updates
    config.awm.advantage_clip = 5.0  # advantage, in standard deviations, that counts as 1
    config.awm.global_std = True  # whether advantages are in all images' deviation (else the prompt's own)
    # Published: 1e-3 for GenEval, 3e-3 for text in images, 1e-4 for PickScore.
    config.awm.kl_weight = 1e-3  # factor of |output - the untuned model's|^2 in the loss; 0: none
    config.awm.average_weight = 1.0  # factor of |output - that of an average of the LoRA's past|^2; 0: no average
    config.awm.average_rate = 1e-3  # what each update adds to the decay of the average
    config.awm.average_most = 0.3  # largest decay of the average

    # Entropy-regularised control: the reward's gradient less the KL of the paths (Uehara et al. 2024a).
    config.entropy = ml_collections.ConfigDict()
    # How many last steps carry gradient: "uniform", "per_step", "fixed"; "none": all
    config.entropy.truncation = "per_step"
    config.entropy.truncation_k = 1  # number of last steps for "fixed"
    # Whether the gradient goes through the later steps' networks, as published, see alignprop.input_gradient
    config.entropy.input_gradient = True
    # The KL is a sum over the steps, a mean over a latent's numbers. 1 is what SEIKO's code has (0.01 of each). The
    # larger it is, the more the images stay as diverse as the untuned model's, and the less is gained.
    # Weight of the KL between the tuned and the untuned model's paths, in the reward's units
    config.entropy.alpha = 1.0
    # For sampling.eta below 1: with 1 a chain forgets where it began. The mean is kept beside the LoRA, and all
    # sampling here begins around it. A LoRA file has no place for it: it is a second file, FILE.x_T.npy.
    config.entropy.start = False  # whether the mean of x_T is learnt too, one for all prompts

    # SEIKO: the gradient of a reward that is learnt from few queries of the true one (Uehara et al. 2024b).
    config.seiko = ml_collections.ConfigDict()
    # A round is an iteration: batch.samples queries of the true reward, a fit, and updates x inner_epochs updates by
    # the learnt reward, each on new noise of batch.samples / updates prompts. The published rounds ask 1024, 2048, 4096
    # and 8192 times, and take 10 updates of 64 samples each.
    config.seiko.updates = 1  # shares that a round's prompts are split into, each for one update
    config.seiko.inner_epochs = 10  # how often a round climbs on all of its prompts
    # The product is taken number by number, so a linear layer can tell how well an image fits its prompt. Wants a
    # reward of `features` that reads both, as pickscore:PATH. The paper's learnt reward knows the image alone.
    # Whether the learnt reward knows the prompt: it reads the image's features times those of its text
    config.seiko.reads_text = False
    # How many last steps carry gradient: "uniform", "per_step", "fixed"; "none": all
    config.seiko.truncation = "uniform"
    config.seiko.truncation_k = 1  # number of last steps for "fixed"
    # Whether the gradient goes through the later steps' networks, as published, see alignprop.input_gradient
    config.seiko.input_gradient = True
    config.seiko.loss_coefficient = 0.01  # factor of the loss
    config.seiko.reward_target = "auto"  # "auto", "none" or a number, see alignprop.reward_target
    # "reward": those of the trained reward's own network. Else a reward by name, as pickscore:PATH, of which only the
    # features are read: for rewards that have none, as a function in plain Python.
    config.seiko.features = "reward"  # whose image features the learnt reward reads
    # "ucb": by an upper confidence bound of its last layer. "bootstrap": the largest of four networks, each fitted to
    # queries drawn with replacement. "none": not at all.
    config.seiko.optimism = "ucb"  # how the learnt reward is raised where little is known
    config.seiko.bonus = 0.01  # factor of the bound of "ucb"
    config.seiko.ridge = 1e-3  # number added to the diagonal of the covariance of "ucb"
    config.seiko.bonus_limit = 10.0  # largest bound of "ucb"
    config.seiko.kl_weight = 0.01  # factor of the path KL to the model that the round began with
    config.seiko.fit_epochs = 300  # passes over the queries of a round's fit
    config.seiko.fit_batch = 512  # queries in a minibatch of the fit
    config.seiko.fit_lr = 1e-3  # Adam's learning rate of the fit
    config.seiko.buffer = 16384  # number of newest queries that are kept
    config.seiko.label_noise = 0.0  # std of the noise added to the true reward; 0.1 in the paper

    # Evaluations between iterations, without exploration.
    config.eval = ml_collections.ConfigDict()
    config.eval.every = 10  # iterations between evaluations; 0: never
    # Prompt sets that are evaluated, each as `prompts`
    config.eval.prompts = ("animal_activities", "animal_activities_unseen", "animals")
    config.eval.rewards = ()  # further rewards to report, never optimised
    config.eval.reward_dtype = "float32"  # type of the networks that evaluation scores with, as `reward_dtype`
    # Of these the same share adds noise as in training, unless eval.eta is 0. Flow-GRPO trains at 10 steps and
    # evaluates at 40.
    config.eval.steps = placeholder(int)  # sampling steps of evaluations; None: sampling.steps
    # 0 is the deterministic chain, as people sample: DDIM's, or the ODE of flow matching. Image grids, evaluate.py and
    # sample.py follow eval.steps, eval.eta and eval.guidance too.
    config.eval.eta = placeholder(float)  # noise of these steps, as sampling.eta; None: that
    # For a run that trains without guidance (sampling.guidance=1), whose model people sample with it.
    config.eval.guidance = placeholder(float)  # guidance of evaluations, as sampling.guidance; None: that
    config.eval.samples_per_prompt = 1  # images of each prompt in an evaluation
    config.eval.samples_per_set = 1  # images of each set at least: a small set gets more of each prompt

    # Image grids, and where else the rows of metrics go.
    config.log = ml_collections.ConfigDict()
    config.log.images_every = 10  # iterations between image grids; 0: never
    config.log.images = 12  # pictures in a grid: fixed prompts, fixed seeds
    # Whether to write metrics and grids as TensorBoard's event files, to WORKDIR/tensorboard
    config.log.tensorboard = False
    # Whether to send them to Weights & Biases (pip install wandb; WANDB_MODE=offline: no account)
    config.log.wandb = False

    # On a GPU sums are made in any order: a run that is repeated or resumed differs in its last bits, and soon in more.
    # True asks XLA for kernels that repeat themselves, which may be slower. CPUs do without it.
    config.deterministic = False  # whether GPUs must give the same bits each time
    config.compilation_cache = "~/.cache/diffexp_jax"  # folder that keeps compiled programs for the next run; "": none

    # One run over several processes, one a machine or one a GPU.
    # TPU pods, SLURM and Open MPI need none of it (docs/use/launch.md).
    config.hosts = ml_collections.ConfigDict()
    # HOST:PORT of the first process; None: JAX_COORDINATOR_ADDRESS, or as found
    config.hosts.coordinator = placeholder(str)
    # Number of processes; None: JAX_NUM_PROCESSES, or as found; 1: one host in any environment
    config.hosts.number = placeholder(int)
    config.hosts.index = placeholder(int)  # index of this process, from 0; None: JAX_PROCESS_ID, or as found
    config.hosts.initialization_timeout = 300  # seconds within which all processes have to be there
    config.hosts.heartbeat_timeout = 100  # seconds of silence after which a process counts as gone and the others end

    # How the frozen model lies on the devices; what a run computes does not depend on it.
    config.parallel = ml_collections.ConfigDict()
    # For models that one device cannot hold: the gathering takes time. "auto": where a copy of the network would fill
    # more than a third of a device's memory.
    # Whether each device holds a part of the network's large weights, and gathers a layer's where it uses it
    config.parallel.shard_weights = "auto"

    # SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) end a run after the current iteration, saved. An iteration
    # that takes longer is stopped, and the state before it is saved. Schedulers kill some 30 s after SIGTERM.
    config.stop_grace = 20.0  # seconds that an iteration may take after a signal

    # Which checkpoints are kept.
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 10  # iterations between checkpoints (and one at the end)
    config.checkpoint.keep = 2  # newest checkpoints kept
    # Besides them the one after which this metric was largest, e.g. "eval/animals/emoji_judge"; it is written when the
    # metric is, whatever `every` says. sample.py, evaluate.py and export_lora.py take it by --checkpoint best.
    config.checkpoint.best = ""  # metric whose best checkpoint is kept too, a name of metrics.jsonl; "": none
    return config
