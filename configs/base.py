"""Every setting of a run, with its default, meaning and unit; the other configs start from `default()`.

Plain ml_collections: nothing in configs/ imports the package. Arguments choose structure (`arguments.py`); single
numbers are overridden by flags, e.g. `--config.optim.lr=3e-4`.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def default() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.seed = 0  # of everything random: same seed, same run
    c.algorithm = placeholder(str)  # "ddpo", "dpok", "alignprop" or "draft"
    c.cpu_devices = placeholder(int)  # that a CPU is used as; None: one per core, as the batch and the memory allow
    # Ours: the paper gives no number. Exploration ends at three quarters of it (`exploration.fraction`): of 100
    # iterations of 64 images, which are 6,400 reward queries, after 4,800.
    c.iterations = 100  # optimizer iterations: a batch of samples each

    c.model = m = ml_collections.ConfigDict()
    m.path = "emoji"  # "emoji", "emoji_hard" (shipped), a folder in diffusers' format, or of the hub: hub:ORG/NAME
    m.revision = placeholder(str)  # of the hub's repository: branch, tag or commit; None: its main branch
    m.variant = placeholder(str)  # "fp16": take the half-precision weight files; None: the whole ones if there are any
    # A single file has none: a folder with CLIP's vocab.json and merges.txt, or hub:ORGANISATION/NAME; None: that of
    # the published model on the hub.
    m.tokenizer = placeholder(str)  # of a single file
    # "float32", "bfloat16", "float16", "auto" = bfloat16 on accelerators, float32 on a CPU. LoRA, latents, log-probs
    # and losses are float32 always, and so is SDXL's VAE in place of float16, in which it overflows.
    m.dtype = "auto"  # of weights and networks
    # How an accelerator multiplies float32 matrices, by jax's names: "default" (TF32 on NVIDIA GPUs, one pass of
    # bfloat16 on TPUs), "bfloat16", "tensorfloat32", "float32" (in full), "auto" = in full where model.dtype is
    # float32.
    m.matmul_precision = "auto"  # of the model's networks
    m.image_size = placeholder(int)  # pixels of a side; None: what the model was trained at
    # What the backward pass computes again instead of keeping, from fast to small: "none"; each sampling "step" (one
    # latent a step is kept); also each "block" of the UNet. DDPO's gradient is of one step at a time: "none" is "step".
    m.remat = "step"  # "none", "step" or "block"
    # Of the model's scheduler_config.json, in its words; None: as in the file. A model that was saved with DPM++ or
    # Euler may want timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False (docs/guide.md).
    m.scheduler = s = ml_collections.ConfigDict()
    s.timestep_spacing = placeholder(str)  # "leading", "trailing" or "linspace": which timesteps are sampled
    s.steps_offset = placeholder(int)  # added to the timesteps of "leading"
    s.set_alpha_to_one = placeholder(bool)  # False: the last step ends at the noise of timestep 0; True: at none
    s.prediction_type = placeholder(str)  # "epsilon" or "v_prediction": what the network was trained to predict
    s.rescale_betas_zero_snr = placeholder(bool)  # True: the last timestep is pure noise (with "v_prediction")
    s.clip_sample = placeholder(bool)  # False for a file whose "true" is not meant; "true" is not supported
    s.shift = placeholder(float)  # of flow matching's noise levels
    m.vae_slice = 32  # images that the VAE decodes at once, at most

    # A built-in set; a file (.txt, .csv, .tsv, .json); rows of one, FILE.csv:COLUMN=VALUE|VALUE; a single prompt: its
    # words, or prompt:TEXT, which may be one word.
    c.prompts = "animal_activities"  # what to fine-tune on
    # NAME, NAME:PATH, NAME:hub:ORG/NAME, textnorm(NAME:PATH), several joined by "+"; the user's own function:
    # jax:MODULE:FUNCTION or, for ddpo, python:MODULE:FUNCTION
    c.reward = "emoji_pickscore"  # what is maximised, in the reward's own units
    c.reward_weights = ()  # of the parts of several rewards, in their order; (): those of DRaFT and PRDP

    c.reward_dtype = "float32"  # of the trained reward's networks: "float32", "bfloat16", "float16"

    c.host_reward = h = ml_collections.ConfigDict()  # of plain Python: python:..., jpeg_compressibility
    h.timeout = 600.0  # seconds that a call may take (on samples_per_forward images) before the run stops
    h.workers = 4  # threads, each in a call of its own

    c.textnorm = t = ml_collections.ConfigDict()  # of textnorm(...), Kim et al. 2024
    t.temperature = 1.0  # of the softmax over prompts, in the reward's units (a cosine wants about 0.01)
    t.contrast = placeholder(str)  # json file {prompt: [contrastive prompts]}; None: swap animals and activities

    c.batch = b = ml_collections.ConfigDict()
    b.samples = 64  # images an iteration, over all devices
    b.samples_per_forward = 32  # images a device handles at once; smaller needs less memory
    b.group = 1  # images of each prompt that an iteration draws: batch.samples / batch.group prompts

    c.sampling = s = ml_collections.ConfigDict()
    s.steps = 50  # DDIM steps, 1..1000
    s.guidance = 5.0  # classifier-free guidance scale w (Eq. 4); 1 is none
    # In training and evaluation. w of Eq. 4 weighs the prompt against it: 1 leaves it out, and a w_low of less than 1
    # leads towards it. Eq. 8 weighs words against "" as ever.
    s.negative_prompt = ""  # what guidance leads away from, as in diffusers; "": from no prompt
    s.eta = 1.0  # DDIM noise: 0 deterministic, 1 as in DDPM

    c.exploration = e = ml_collections.ConfigDict()
    e.enabled = True  # False: plain fine-tuning, bit for bit
    e.w_low = 1.0  # Eq. 7: guidance while t > t_thresh (ours: the paper says "extremely low")
    e.t_thresh = 900  # Eq. 7: in training timesteps, 0..1000 (ours)
    e.weight_range = (1.0, 1.5)  # Eq. 8: the weight is uniform in it (ours)
    e.unit = "word"  # Eq. 8: what is weighted together: "word", "token" or "phrase"
    e.scope = "image"  # Eq. 8: a draw for each "image", or for each "prompt", the same for its images of an iteration
    e.fraction = 0.75  # of the iterations, from the first, that explore; rounded up
    # A run that is continued with more iterations keeps the number that it began with, unless this says another.
    e.iterations = placeholder(int)  # that many of the first explore; None: by the fraction

    c.lora = lo = ml_collections.ConfigDict()
    lo.rank = 4  # of the update A B that is added to each layer that takes LoRA
    lo.alpha = 4.0  # the update is scaled by alpha / rank
    # Of the UNet: "attention" (the four projections of each), "feed_forward", "projections" (proj_in and proj_out),
    # "convolutions" (of residual blocks and between levels), or single layers of these by name: "to_k".
    lo.targets = ("attention",)  # which layers take LoRA
    lo.path = placeholder(str)  # a LoRA file or folder to start from (diffusers, peft, kohya); None: from nothing

    c.optim = o = ml_collections.ConfigDict()  # AdamW
    o.lr = 3e-4  # learning rate
    o.schedule = "constant"  # or "linear", "cosine": it falls to 0 over the run's updates
    o.warmup = 0  # optimizer updates over which the rate first rises from 0, before the schedule; 0: none
    o.ema = 0.0  # decay of a moving average of the LoRA, which evaluation, grids and exports then take; 0: none
    o.b1 = 0.9  # decay of the gradient's running mean
    o.b2 = 0.999  # decay of its running square
    o.eps = 1e-8  # added to the root of that square
    o.weight_decay = 1e-4  # times lr, decoupled from the gradient
    o.grad_clip = 1.0  # global norm

    c.ddpo = d = ml_collections.ConfigDict()
    d.updates = 2  # optimizer updates an iteration, each on batch.samples / updates images
    d.inner_epochs = 1  # passes over an iteration's samples
    d.clip = 1e-4  # of the importance ratio
    d.advantage_clip = 5.0  # in standard deviations
    d.stats_buffer = 32  # newest rewards kept per prompt
    # "sampled": the log-probs of the sampling program. "recomputed": the same by the update program, for one more
    # forward pass of all but the first update's samples. "current": each update's own, so that there is no ratio and
    # no clip. "auto": "sampled" in float32 on a CPU, else "recomputed" (docs/precision.md).
    d.old_log_prob = "auto"  # what the importance ratio is relative to
    # "onepass": each sample's gradient is made while it is sampled, for ddpo.updates = ddpo.inner_epochs = 1 alone: no
    # second pass of the network, no stored chains, but a gradient per sample. "twopass": after the rewards are known.
    # "auto": in one pass where an iteration is one update and the gradients take at most 2 GiB a device.
    d.gradient = "auto"  # when the gradient is made
    d.stats_min_count = 16  # rewards of a prompt before its own mean and std are used
    # 1: all, as published. DDIM's last but one step, to an image with hardly any noise left, has by far the largest
    # gradient and says least about the reward: the fewer the steps, the more so (docs/results.md).
    d.timestep_fraction = 1.0  # of the steps, from the noise on, that the update learns from

    c.alignprop = a = ml_collections.ConfigDict()
    a.truncation = "uniform"  # how many last steps carry gradient: "uniform", "per_step", "fixed"; "none": all
    a.truncation_k = 1  # for "fixed": that many
    # False: a step's gradient goes through the linear part of the later steps alone, not through their networks, as in
    # DRTune (Wu et al. 2024). Through ten or more networks a few samples' gradients blow up (docs/results.md).
    a.input_gradient = True  # as published
    a.loss_coefficient = 0.01  # factor of the loss
    # What rewards are pulled to: the loss is mean |target - r| for a number, mean(-r) for "none"; "auto" is 10 for the
    # aesthetic reward alone, as published, else "none".
    a.reward_target = "auto"  # "auto", "none" or a number

    c.draft = f = ml_collections.ConfigDict()
    f.k = 1  # how many last steps carry gradient
    f.lv_samples = 0  # DRaFT-LV (with k = 1): further noises of the last step, 2 in the paper; 0: DRaFT-K

    c.dpok = p = ml_collections.ConfigDict()
    p.updates = 2  # optimizer updates an iteration, each on batch.samples / updates images
    p.inner_epochs = 1  # passes over an iteration's samples
    p.clip = 1e-4  # of the importance ratio
    p.reward_weight = 10.0  # factor of the policy gradient's loss
    p.kl_weight = 0.01  # factor of the penalty for leaving the untuned model
    p.value_baseline = True  # whether a value function is subtracted from the reward
    p.value_lr = 1e-4  # learning rate of that function (AdamW, weight decay 0.01)
    p.value_steps = 1  # AdamW steps that it takes each iteration; published: one for 10 images
    p.value_batches = 5  # minibatches of 256 random states that the gradient of each of those steps is the mean over
    p.old_log_prob = "auto"  # what the importance ratio is relative to, see ddpo.old_log_prob
    p.timestep_fraction = 1.0  # of the steps, from the noise on, that the update learns from, see ddpo's

    c.eval = v = ml_collections.ConfigDict()
    v.every = 10  # iterations between evaluations (without exploration); 0: never
    v.prompts = ("animal_activities", "animal_activities_unseen", "animals")  # each as `prompts` above
    v.rewards = ()  # further rewards to report, never optimised
    v.reward_dtype = "float32"  # of the networks that evaluation scores with, as `reward_dtype` above
    v.samples_per_prompt = 1  # images of every prompt
    v.samples_per_set = 1  # images of every set, at least: of a few prompts it takes several each

    c.log = log = ml_collections.ConfigDict()
    log.images_every = 10  # iterations between image grids; 0: never
    log.images = 12  # pictures in a grid: fixed prompts, fixed seeds
    # Rows of metrics.jsonl, and the image grids:
    log.tensorboard = False  # also write them to WORKDIR/tensorboard, as TensorBoard's event files
    log.wandb = False  # also send them to Weights & Biases (pip install wandb; WANDB_MODE=offline needs no account)

    # On a GPU sums are made in any order: a run that is repeated or continued differs in its last bits, and soon in
    # more. True asks XLA for kernels that repeat themselves, which are slower (docs/accelerators.md). CPUs do without
    # it.
    c.deterministic = False  # whether GPUs must give the same bits each time

    c.compilation_cache = "~/.cache/diffexp_jax"  # compiled programs are kept there for the next run; "": nowhere

    # One run over several processes, one a machine or one a GPU. TPU pods, SLURM and Open MPI need none of it
    # (docs/launch.md).
    c.hosts = h = ml_collections.ConfigDict()
    h.coordinator = placeholder(str)  # HOST:PORT of the first; None: JAX_COORDINATOR_ADDRESS, or as found out
    h.number = placeholder(int)  # of processes; None: JAX_NUM_PROCESSES, or as found out; 1: it is the only one
    h.index = placeholder(int)  # of this one, from 0; None: JAX_PROCESS_ID, or as found out
    h.initialization_timeout = 300  # seconds within which all have to be there
    h.heartbeat_timeout = 100  # seconds after which one that says nothing counts as gone, and the others end

    # SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) end a run after the iteration that goes on, saved. An
    # iteration that takes longer than this is broken off, and the state before it saved. Schedulers kill some 30 s
    # after SIGTERM.
    c.stop_grace = 20.0  # seconds

    c.checkpoint = k = ml_collections.ConfigDict()
    k.every = 10  # iterations between checkpoints (and one at the end)
    k.keep = 2  # newest checkpoints kept
    # Besides them the one after which this metric was largest, e.g. "eval/animals/emoji_judge"; it is written when the
    # metric is, whatever `every` says. scripts/sample.py, evaluate.py and export_lora.py take it by --checkpoint best.
    k.best = ""  # a name of metrics.jsonl; "": none
    return c
