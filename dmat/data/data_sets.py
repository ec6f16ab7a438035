"""What is published about the data sets that dmat reads: the only place where these facts are written.

Sources, normalisation, imports of published models and `dmat sources list` take them from here.
"""

import dataclasses

from dmat import SOURCES

NOT_STATED = "unknown"  # licence
MeanAndStd = tuple[tuple[float, ...], tuple[float, ...]]

_DIGITS = tuple("0123456789")
_HUNDRED = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """The facts about one data set.

    size: height and width in pixels. channels: 1 grey, 3 colour. train, test: published numbers of images; test is 0
    without published test images. class_names: in label order; empty if only the files have them. normalisation: mean
    and std of each channel for pixels in [0, 1], as published; None if nothing is. augmentation: a name in
    `augmentation.AUGMENTATIONS`. norm, epsilon: the usual threat model, epsilon in units of [0, 1], as it is written.
    layouts: alternatives, each the files or folders that it consists of. page: where people find the data.
    torchvision: the class in `torchvision.datasets` that has addresses and checksums of the files; "" if there is none.
    """

    title: str
    authors: str
    classes: int
    size: int
    channels: int
    train: int
    test: int
    augmentation: str
    norm: str
    epsilon: str
    class_names: tuple[str, ...] = ()
    normalisation: MeanAndStd | None = None
    licence: str = NOT_STATED
    layouts: tuple[tuple[str, ...], ...] = ()
    page: str = ""
    torchvision: str = ""


# CIFAR, SVHN, TinyImageNet: mean, std, augmentation and threat as in Wang et al. 2023; the constants of CIFAR are also
# those of RobustBench. MNIST: mean and std of PyTorch's examples, threat of Madry et al. 2018. Fashion-MNIST: mean and
# std measured on its 60,000 training images, threat of Wong and Kolter 2018. digits: choice of the recipe digits. A
# licence is unknown unless the authors name it.
DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet(
        "digits of scikit-learn",
        "Alpaydin and Kaynak 1998",
        *(10, 8, 1, 1_797, 0),
        *("crop1", "linf", "1/5"),
        class_names=_DIGITS,
        licence="CC BY 4.0",
        page="https://archive.ics.uci.edu/dataset/80",
    ),
    "cifar10": DataSet(
        "CIFAR-10",
        "Krizhevsky 2009",
        *(10, 32, 3, 50_000, 10_000),
        *("crop4_flip", "linf", "8/255"),
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        normalisation=((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        layouts=(("cifar-10-batches-py",), ("cifar-10-batches-bin",)),
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        torchvision="CIFAR10",
    ),
    "cifar100": DataSet(
        "CIFAR-100",
        "Krizhevsky 2009",
        *(100, 32, 3, 50_000, 10_000),
        *("crop4_flip_rotate15", "linf", "8/255"),
        class_names=tuple(_HUNDRED.split()),
        normalisation=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        layouts=(("cifar-100-python",), ("cifar-100-binary",)),
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        torchvision="CIFAR100",
    ),
    "svhn": DataSet(
        "SVHN",
        "Netzer et al. 2011",
        *(10, 32, 3, 73_257, 26_032),
        *("none", "linf", "8/255"),
        class_names=_DIGITS,
        normalisation=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        layouts=(("train_32x32.mat", "test_32x32.mat"),),
        page="http://ufldl.stanford.edu/housenumbers",
        torchvision="SVHN",
    ),
    "tinyimagenet": DataSet(
        "TinyImageNet",
        "Stanford CS231n",
        *(200, 64, 3, 100_000, 10_000),
        *("crop4_flip", "linf", "8/255"),
        normalisation=((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        layouts=(("tiny-imagenet-200",), ("train.npz", "val.npz")),
        page="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
    "mnist": DataSet(
        "MNIST",
        "LeCun et al. 1998",
        *(10, 28, 1, 60_000, 10_000),
        *("none", "linf", "0.3"),
        class_names=_DIGITS,
        normalisation=((0.1307,), (0.3081,)),
        layouts=(_IDX_FILES,),
        page="http://yann.lecun.com/exdb/mnist",
        torchvision="MNIST",
    ),
    "fashion_mnist": DataSet(
        "Fashion-MNIST",
        "Xiao et al. 2017",
        *(10, 28, 1, 60_000, 10_000),
        *("none", "linf", "0.1"),
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"),
            "Ankle boot",
        ),
        normalisation=((0.286,), (0.353,)),
        licence="MIT",
        layouts=(_IDX_FILES,),
        page="https://github.com/zalandoresearch/fashion-mnist",
        torchvision="FashionMNIST",
    ),
}
NORMALISATIONS: dict[str, MeanAndStd] = {
    name: data_set.normalisation for name, data_set in DATA_SETS.items() if data_set.normalisation
}


def origin(name: str, version: str, train: int, test: int) -> str:
    """Title, authors, version of the files, and the numbers of images if they are not the published ones."""
    data_set = DATA_SETS[name]
    part = "" if (train, test) == (data_set.train, data_set.test) else f", a part of it: {train:,} and {test:,} images"
    return f"{data_set.title} ({data_set.authors}), {version}{part}"


def expected_files(name: str) -> str:
    """The files of a data set as text: "a or b", "c, d and e"."""
    return " or ".join(" and ".join(filter(None, (", ".join(a), b))) for *a, b in DATA_SETS[name].layouts)


def where_to_put(name: str) -> str:
    """The sentence on which files to put where."""
    return f"put {expected_files(name)}, from {DATA_SETS[name].page}, into {SOURCES}/{name}"


def how_to_get(name: str) -> str:
    """`where_to_put`, and the command that downloads the files, if there is one."""
    command = f", or run `dmat sources download {name}`" if DATA_SETS[name].torchvision else ""
    return where_to_put(name) + command
