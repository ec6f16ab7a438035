"""Finds keys of earlier versions of params.yaml, and says what to write today."""

from collections.abc import Collection, Iterator, Mapping

from dmat import NONE

# Old name of a setting -> its name today, in any place: a section, an arm, overrides or the space of a study.
_NEW_NAMES = {
    "average_tau": "ema_decay",
    "average_warm_up": "ema_warmup",
    "average_half_life": "ema_half_life",
    "warm_up": "warmup",
    "warm_up_images": "warmup_images",
}
_NETWORK_KEYS = ("channels", "multipliers", "blocks", "dropout")  # of a denoiser


def denoiser_of_an_earlier_version(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings of a denoiser, as a sidecar of an earlier version holds them, in today's form.

    The keys of its network, which was always `unet`, were not in a mapping of their own.
    """
    network = {"name": "unet", **{name: settings[name] for name in _NETWORK_KEYS}}
    others = {_NEW_NAMES.get(name, name): value for name, value in settings.items() if name not in _NETWORK_KEYS}
    return {"network": network, **others}


def renamed(raw: Mapping[str, object], lists: Collection[str]) -> list[str]:
    """A sentence for each old key of a file, with its replacement; empty for a file of this version.

    lists: keys whose entries have names of their owner.
    """
    of_sections = (_chunks, _arms, _lengths, _path, _measures, _denoisers)
    return [*(problem for check in of_sections for problem in check(raw)), *_settings(raw, lists)]


def _mapping(raw: Mapping[str, object], *keys: str) -> Mapping[str, object]:
    """The mapping at a path of keys; empty if there is none."""
    value: object = raw
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _chunks(raw: Mapping[str, object]) -> Iterator[str]:
    size = _mapping(raw, "generate_images").get("chunk")
    if "chunks" in raw:
        generators_by_set: dict[str, list[str]] = {}
        for entry in _mapping(raw, "chunks").values():
            if isinstance(entry, Mapping):
                generators_by_set.setdefault(str(entry.get("image_set")), []).append(str(entry.get("generator")))
        sets = []
        for name, generators in generators_by_set.items():
            chunk_size = _mapping(raw, "image_sets", name).get("chunk", size)
            images = len(generators) * chunk_size if type(chunk_size) is int else "COUNT"
            sets.append(f"{name}: {{generator: {generators[0]}, source: none, images: {images}}}")
        yield (
            f"chunks is no longer a list: an image set names its generator and its number of images; leave it out and "
            f"write image_sets: {{{', '.join(sets) or 'NAME: {generator: GENERATOR, source: none, images: COUNT}'}}}"
        )
    if size is not None:
        yield (
            f"generate_images.chunk is {size!r}; expected no such key; leave it out and give the number of images as "
            f"`images` to each entry of image_sets"
        )
    for name in _mapping(raw, "image_sets"):
        if "chunk" in _mapping(raw, "image_sets", str(name)):
            yield f"image_sets.{name}.chunk is no longer a key; write the number of images of the set as `images`"


def _arms(raw: Mapping[str, object]) -> Iterator[str]:
    for name in _mapping(raw, "arms"):
        arm = _mapping(raw, "arms", str(name))
        if "images_from" in arm:
            path = str(arm["images_from"])
            selection = NONE if path.endswith("prepare_data/train") else path.rpartition("/")[2]
            yield (
                f"arms.{name}.images_from is {path!r}; an arm names its selection, not a path: write "
                f"images: {selection} in its place"
            )


def _lengths(raw: Mapping[str, object]) -> Iterator[str]:
    """`images` was once the length of a training; today it is the selection that an arm trains on."""
    sections = [(name,) for name in ("train_scorer", "train_diffusion", "train_robust", "tune")]
    entries = [(key, str(name)) for key in ("generators", "arms") for name in _mapping(raw, key)]
    for keys in [*sections, *entries]:
        value = _mapping(raw, *keys).get("images")
        if isinstance(value, int | float):
            yield f"{'.'.join(keys)}.images is {value}; the length of a training is called images_seen: write that"


def _path(raw: Mapping[str, object]) -> Iterator[str]:
    section = _mapping(raw, "prepare_data")
    if section and section.get("path") is None and section.get("source") in ("digits", None):
        yield f"prepare_data.path is missing; write path: {NONE}, as digits need no files"


def _measures(raw: Mapping[str, object]) -> Iterator[str]:
    section = _mapping(raw, "measure_images")
    if section and "features_file" not in section and section.get("features", "scorer") != "inception":
        yield f"measure_images.features_file is missing; write features_file: {NONE}, as only inception reads a file"


def _denoisers(raw: Mapping[str, object]) -> Iterator[str]:
    """Generators were always trained, and settings of their network stood beside those of the training."""
    entries = _mapping(raw, "generators")
    for keys in (("train_diffusion",), *(("generators", str(name)) for name in entries)):
        section = _mapping(raw, *keys)
        if old := {name: section[name] for name in _NETWORK_KEYS if name in section}:
            network = {"name": "unet", **old} if keys == ("train_diffusion",) else old
            text = ", ".join(f"{name}: {value}" for name, value in network.items())
            yield (
                f"{'.'.join(keys)}.{next(iter(old))} is no longer a key; the network has a section of its own: write "
                f"network: {{{text}}}"
            )
    for name in entries:
        if "source" not in _mapping(raw, "generators", str(name)):
            yield (
                f"generators.{name}.source is missing; expected `source: {NONE}` for a model that is trained here, or "
                f"the name of a file of published weights in sources/: write one of them"
            )


def _settings(raw: object, lists: Collection[str], path: str = "") -> Iterator[str]:
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            key_path = f"{path}.{key}" if path else str(key)
            new = _NEW_NAMES.get(str(key).rpartition(".")[2])
            if new is not None and path not in lists:  # an entry may have any name
                yield f"{key_path} is no longer a key; the setting is called {new}: write that"
            yield from _settings(value, lists, key_path)
    elif isinstance(raw, list):
        for number, value in enumerate(raw):
            yield from _settings(value, lists, f"{path}.{number}")
