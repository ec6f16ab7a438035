"""The card of a data set: README.md with the YAML front matter that Hugging Face reads.

It says what the images are, under which licence and why, how they were generated and measured, and how to load them.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dmat.data import licences
from dmat.data.set_inspection import SetDescription

if TYPE_CHECKING:  # importing it loads torch
    from dmat.training.weights import DenoiserSidecar

SHARDS = "shards"  # the layout of a set on disk, beside the formats of `data.image_export`
_LOADING = {
    "shards": """\
import json, numpy as np
from pathlib import Path

folder = Path(".")
manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
shards = [  # memory-mapped: uint8 [N, H, W, C] and int64 [N]
    (np.load(folder / s["images"], mmap_mode="r"), np.load(folder / s["labels"], mmap_mode="r"))
    for s in manifest["shards"]
]""",
    "npz": """\
import numpy as np

archive = np.load("{name}.npz")  # each array is read when it is asked for
images, labels = archive["image"], archive["label"]  # uint8 [N, H, W, C] and int64 [N]""",
    "parquet": """\
from datasets import load_dataset

images = load_dataset(".", split="train")  # each row: image (PIL) and label""",
    "webdataset": """\
import glob, webdataset

tars = sorted(glob.glob("train-*.tar"))
images = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("png", "cls")""",
    "folder": """\
from torchvision.datasets import ImageFolder

images = ImageFolder(".")  # numbers the classes by their names in alphabetical order""",
}
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")


def text(
    name: str,
    description: SetDescription,
    images: int,
    layout: str = SHARDS,
    generator: "DenoiserSidecar | None" = None,
    measures: Mapping[str, Mapping[str, object]] | None = None,
) -> str:
    """The card as Markdown.

    images: how many of the set are published. layout: "shards" or a format of `data.image_export`. generator: sidecar
    of the model that generated the set. measures: selection of the set -> what measure_images said of it.
    """
    sections = [
        *_front_matter(name, description, images, layout),
        f"# {name}\n",
        f"{_summary(description, images)}\n",
        "## Licence\n",
        *_licence(description, generator),
        *(["## How they were generated\n", *_generation(description, generator)] if _generated(description) else []),
        *(["## Measures\n", *_measures(measures)] if measures else []),
        "## Classes\n",
        *_classes(description, images),
        "## How to load them\n",
        f"```python\n{_LOADING[layout].replace('{name}', name)}\n```\n",
    ]
    return "\n".join(sections)


def _generated(description: SetDescription) -> bool:
    return description["generator_sha256"] is not None


def _front_matter(name: str, description: SetDescription, images: int, layout: str) -> Iterator[str]:
    """The lines of the front matter. Texts are JSON, which YAML reads as they are."""
    spdx = licences.spdx(description["licence"])
    yield "---"
    yield f"license: {spdx.lower()}" if spdx else f"license: other\nlicense_name: {json.dumps(description['licence'])}"
    yield f"pretty_name: {json.dumps(name)}"
    yield "task_categories:\n- image-classification"
    if _generated(description):
        yield "tags:\n- synthetic\n- diffusion"
    yield f"size_categories:\n- {json.dumps(_SIZES[_decade(images)])}"
    if layout == "parquet":
        yield "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*"
        yield "dataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label"
        names = description["class_names"]
        numbered = "".join(f"\n          '{label}': {json.dumps(class_name)}" for label, class_name in enumerate(names))
        yield f"    dtype:\n      class_label:\n        names:{numbered}" if names else "    dtype: int64"
    yield "---\n"


def _decade(images: int) -> int:
    """Position of a number of images in the sizes that Hugging Face counts by."""
    return min(max(math.floor(math.log10(max(images, 1))) - 2, 0), len(_SIZES) - 1)


def _summary(description: SetDescription, images: int) -> str:
    height, width, channels = description["shape"]
    colour = "grey" if channels == 1 else "RGB"
    labels = f"in {description['classes']} classes" if description["labelled"] else "without labels"
    part = "" if images == description["images"] else f"The first {images:,} of "
    kind = "generated images" if _generated(description) else "images"
    origin = f" {description['origin']}." if description["origin"] else ""
    return f"{part}{description['images']:,} {kind}, {height} x {width} pixels, {colour}, {labels}.{origin}"


def _licence(description: SetDescription, generator: "DenoiserSidecar | None") -> Iterator[str]:
    """The licence of the images and, as far as it is recorded, from what they inherit it."""
    yield f"- The images: **{description['licence']}**."
    if generator is not None:
        origin = generator.get("origin")
        if origin is not None:
            yield (
                f"- They inherit it from the published weights that generated them, `{origin['file']}` (SHA-256 "
                f"`{origin['sha256'][:12]}`): {generator.get('licence', 'unknown')}."
            )
        else:
            yield (
                f"- They inherit it from the images that their generator learned: "
                f"{generator.get('licence_of_data', 'unknown')}."
            )
    if description["licence"] == "unknown":
        yield "- Nobody stated a licence: ask whoever published the weights or images before you pass them on."
    yield ""


def _generation(description: SetDescription, generator: "DenoiserSidecar | None") -> Iterator[str]:
    sampler = description["sampler"] or {}
    yield f"- Diffusion model: weights with SHA-256 `{description['generator_sha256']}`"
    if generator is not None:
        yield f"- Network: `{json.dumps(dict(generator['network']), sort_keys=True)}`"
        yield f"- Formulation: {generator['formulation']}"
    yield f"- Sampler: `{json.dumps(dict(sampler), sort_keys=True)}`"
    yield f"- Seed: {description['seed']}; image *k* has latents of its own, named by the seed and *k*"
    yield f"- Manifest: SHA-256 `{description['manifest_sha256']}`\n"


def _measures(measures: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """A table: measures in rows, selections in columns."""
    names = sorted({name for values in measures.values() for name in values})
    yield _row(["measure", *measures])
    yield _row(["---"] * (len(measures) + 1))
    for name in names:
        cells = [values.get(name, "–") for values in measures.values()]
        yield _row([name, *(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)])
    yield "\nEach column is a selection of the images, compared with real ones by a classifier of these classes: values"
    yield "of another classifier, such as published FIDs, are not comparable.\n"


def _classes(description: SetDescription, images: int) -> Iterator[str]:
    """A table of the classes; of a part of a set, without counts."""
    whole = images == description["images"] and description["labelled"]
    yield _row(["label", "class", *(["images"] if whole else [])])
    yield _row(["---"] * (3 if whole else 2))
    for label, (name, count) in enumerate(zip(description["class_names"], description["class_counts"], strict=True)):
        yield _row([str(label), name.replace("|", "\\|"), *([f"{count:,}"] if whole else [])])
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
