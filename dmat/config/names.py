"""The names that a params.yaml may give to what dmat has: networks, losses, samplers and others.

The functions of these names are in tables of the modules that compute, most of which load torch. Reading a params.yaml
needs the names alone, so they are here too, and the functions are loaded when they are used. A test compares each list
with its table.
"""

NETWORKS: tuple[str, ...] = (  # of classifiers: dmat.robust.networks
    "wide_resnet",
    "wide_resnet_symmetric",
    "preact_resnet",
    "ra_wide_resnet",
    "vit",
)
ACTIVATIONS: tuple[str, ...] = ("relu", "silu", "gelu")  # dmat.robust.networks
LOSSES: tuple[str, ...] = (  # dmat.robust.losses
    "trades",
    "standard",
    "pgd_at",
    "ikl",
    "mart",
    "lse",
    "consistency",
)
OBJECTIVES: tuple[str, ...] = ("ce", "cw", "dlr")  # of PGD: dmat.robust.attacks
ATTACKS: tuple[str, ...] = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")  # dmat.robust.auto_attack
AUGMENTATIONS: tuple[str, ...] = (  # dmat.data.augmentation
    "none",
    "crop1",
    "crop4",
    "crop4_flip",
    "crop4_flip_rotate15",
    "cutout18",
    "autoaugment",
    "autoaugment_pil",
    "randaugment",
    "idbh",
)
SOURCES: tuple[str, ...] = (  # of real images: dmat.data.sources
    "digits",
    "cifar10",
    "cifar100",
    "svhn",
    "tinyimagenet",
    "mnist",
    "fashion_mnist",
    "folder",
    "npz",
    "parquet",
    "shards",
)
SOURCES_WITH_FILES = tuple(name for name in SOURCES if name != "digits")  # those that need a path in sources/
SCORES: tuple[str, ...] = ("probability", "margin", "certainty")  # of generated images: dmat.data.scores
DENOISERS: tuple[str, ...] = ("unet", "ddpmpp", "ncsnpp", "adm")  # networks: dmat.diffusion.networks
FORMULATIONS: tuple[str, ...] = ("edm", "vp", "ve", "ddpm", "iddpm")  # dmat.diffusion.formulations
BETA_SCHEDULES: tuple[str, ...] = ("linear", "scaled_linear", "squaredcos_cap_v2")  # dmat.diffusion.formulations
PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "v_prediction", "sample")  # dmat.diffusion.formulations
SAMPLERS: tuple[str, ...] = (  # dmat.diffusion.samplers
    "heun",
    "euler",
    "ancestral",
    "dpmpp_2m",
    "dpmpp_3m",
    "unipc_2",
    "unipc_3",
    "ipndm",
)
CHURNED: tuple[str, ...] = ("heun", "euler")  # samplers on which s_churn has an effect: dmat.diffusion.samplers
SEARCHED = "searched"  # the schedule whose levels are found for a denoiser: dmat.diffusion.samplers
# Schedules with a fixed list of noise levels -> how many there are: dmat.diffusion.samplers.
MAX_STEPS = {"ddpm": 1000, "iddpm": 992, SEARCHED: 100}
WITHOUT_LIMITS: tuple[str, ...] = ("edm",)  # formulations that learn all noise levels
