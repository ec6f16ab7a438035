"""EDM against DDPM against no generated images on Fashion-MNIST, in short pieces for one GPU.

    P="python benchmarks/fashion_gpu.py --folder fashion-gpu --data /usr/share/datasets/fashion-mnist"
    $P plan                  # counted operations of every piece
    $P generate edm          # trains a generator and samples its images; also: ddpm
    $P train real_only       # trains the classifier of an arm; also: edm, ddpm
    $P evaluate real_only    # attacks it with PGD and standard AutoAttack; also: edm, ddpm
    $P compare               # result.json: accuracies, and paired differences with 95 % intervals

Every command ends after --seconds at the latest, plus one training step, block of images or shard of test images, saves
what it has, and exits with 75 while work is left; the same command resumes. `train` and `evaluate` of several arms are
independent. All settings are options (`--help`) and must be the same in all commands of a folder, which the script
checks. The 2,000 real images, the test images and all random numbers are named by --seed.

Trains as `train_diffusion` and `train_robust` do, but takes the last weights, with no validation split. Needs torch,
numpy and safetensors alone. Shapes: B batch, N images, C = 1 channel, H = W = 28 pixels.
"""

import argparse
import collections
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dmat import devices, files, modes, seeds
from dmat.data.formats import idx
from dmat.data.mixing import BatchOrder, Mix, ShuffledSequence
from dmat.data.pixels import to_bytes, to_float
from dmat.diffusion import formulations
from dmat.diffusion.networks import NETWORKS, DenoiserSpec
from dmat.diffusion.samplers import SAMPLERS
from dmat.metrics import intervals
from dmat.robust import auto_attack, flops, losses
from dmat.robust.attacks import Ball, margin, pgd
from dmat.robust.networks import DataSpec, wide_resnet
from dmat.training import ema, schedules

ARMS = {"real_only": None, "edm": "edm", "ddpm": "ddpm"}  # arm -> the generator of its images
GENERATORS = ("edm", "ddpm")  # by their formulations
CLASSES, SIZE = 10, 28
EXIT_WORK_LEFT = 75
PGD_STEPS, RESAMPLES = 40, 2000


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a generator samples. Satisfies `diffusion.samplers.SamplerSettings`."""

    name: str
    steps: int
    schedule: str
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = 1e9
    s_noise: float = 1.0


@dataclasses.dataclass(frozen=True)
class DenoiserSettings:
    """Network and formulation. Satisfies `NetworkSettings` and `FormulationSettings` of `dmat.diffusion`."""

    channels: int
    blocks: int
    multipliers: tuple[int, ...] = (1, 2, 2)
    attention: tuple[int, ...] = (7,)
    dropout: float = 0.0
    label_dropout: float = 0.0
    sigma_data: float = 0.7
    p_mean: float = -1.2
    p_std: float = 1.2


class Clock:
    """Says when a piece must end."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def over(self) -> bool:
        """Whether the time of this piece is used up."""
        return time.monotonic() >= self._end


class WorkLeft(Exception):
    """The time of the piece is used up; the same command resumes."""


class Piece:
    """The settings, the device and the files of a piece."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.seed, self.clock = args, args.seed, Clock(args.seconds)
        self.compute = devices.resolve(args.device, args.precision, args.threads)
        self.folder = Path(args.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._expect_same_settings()
        source = idx.read("fashion_mnist", Path(args.data))
        order = ShuffledSequence(self.seed, "real images", len(source.labels)).at(0, args.real)
        self.real = source.images[order], source.labels[order]  # uint8 [N, H, W, C], int64 [N]
        assert source.test is not None  # the reader returns both splits
        self.test = source.test[0][: args.test], source.test[1][: args.test]

    def _expect_same_settings(self) -> None:
        path = self.folder / "settings.json"
        per_call = {"command", "name", "folder", "data", "seconds", "threads"}
        settings = {name: value for name, value in vars(self.args).items() if name not in per_call}
        settings["device"], settings["precision"] = self.compute.device.type, self.compute.precision
        if path.exists() and (earlier := json.loads(path.read_text())) != settings:
            changed = [name for name in settings if settings[name] != earlier.get(name)]
            sys.exit(f"{path} has other {', '.join(changed)}; expected the same; give another --folder")
        files.write_json(path, settings)

    def checkpoint(self, name: str) -> tuple[Path, dict[str, Any] | None]:
        """The checkpoint file `name` and what it holds; None if there is none."""
        path = self.folder / f"{name}.checkpoint"
        return path, torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def run_steps(
    piece: Piece,
    name: str,
    steps: int,
    models: dict[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    step_function: Callable[[int], Tensor],
) -> None:
    """Runs a training from its checkpoint to its end, and saves it when the time is used up.

    step_function: step -> detached loss. models: by their names in the checkpoint. Raises WorkLeft.
    """
    path, state = piece.checkpoint(name)
    first = 0
    if state is not None:
        first = state["step"]
        for key, model in models.items():
            model.load_state_dict(state[key])
        optimiser.load_state_dict(state["optimiser"])
    recent = collections.deque[Tensor](maxlen=50)
    for step in range(first, steps):
        recent.append(step_function(step))
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(
                f"{name}: step {step + 1:,} of {steps:,}, loss {torch.stack([*recent]).mean().item():.4f}", flush=True
            )
        if piece.clock.over() and step + 1 < steps:
            states = {key: model.state_dict() for key, model in models.items()}
            with files.writing(path) as file:
                torch.save({**states, "optimiser": optimiser.state_dict(), "step": step + 1}, file)
            raise WorkLeft


def new_denoiser(piece: Piece, generator: str) -> formulations.Preconditioned:
    """A denoiser with its initial weights, on the device."""
    settings = DenoiserSettings(piece.args.channels, piece.args.blocks)
    seeds.reseed_torch(piece.seed, "initial weights", 0)
    network = NETWORKS["ddpmpp"](DenoiserSpec(SIZE, SIZE, 1, CLASSES), settings)
    formulation = formulations.FORMULATIONS[generator](settings)
    denoiser = formulations.Preconditioned(network, formulation)
    return piece.compute.model_to_device(denoiser)  # type: ignore[return-value]


def train_denoiser(piece: Piece, generator: str) -> formulations.Preconditioned:
    """Trains a denoiser, or resumes. Returns it with its EMA weights, in evaluation mode."""
    args, compute, path = piece.args, piece.compute, piece.folder / f"{generator}.safetensors"
    denoiser = new_denoiser(piece, generator)
    if not path.exists():
        images, labels = piece.real
        ema_model, order = copy.deepcopy(denoiser), ShuffledSequence(piece.seed, "order/real", len(labels))
        optimiser = torch.optim.Adam(denoiser.parameters(), lr=0.0)
        batch, steps = args.generator_batch, -(-args.generator_images_seen // args.generator_batch)

        def train_step(step: int) -> Tensor:
            rows, rng = order.at(step * batch, batch), seeds.stream(piece.seed, "denoiser/noise", step)
            x, y = compute.to_device(to_float(images[rows])) * 2 - 1, torch.from_numpy(labels[rows]).to(compute.device)
            sigma = denoiser.formulation.draw_sigma(rng, batch).to(compute.device)  # [B]
            noise = compute.to_device(seeds.normal(rng, tuple(x.shape)))
            optimiser.param_groups[0]["lr"] = schedules.ramp_then_cosine(step / steps, args.generator_rate, 0.05)
            optimiser.zero_grad(set_to_none=True)
            with modes.mode(denoiser, training=True), compute.autocast():
                loss = formulations.loss(denoiser, x, y, sigma, noise).mean()
            loss.backward()
            optimiser.step()
            half_life = 0.05 * args.generator_images_seen
            ema.update(ema_model, denoiser, ema.half_life_decay(step * batch, batch, half_life))
            return loss.detach()

        run_steps(piece, generator, steps, {"live": denoiser, "ema": ema_model}, optimiser, train_step)
        save_weights(path, ema_model)
    denoiser.load_state_dict(load_file(path))
    return denoiser.eval().requires_grad_(False)


def save_weights(path: Path, model: nn.Module) -> None:
    """Writes the state dict of a model; the file is complete or absent."""
    with files.writing(path) as file:
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}))


def sampler_of(generator: str, args: argparse.Namespace) -> Sampler:
    """EDM: Heun's method. DDPM: its own ancestral sampler, on evenly spaced steps of its 1,000."""
    if generator == "edm":
        return Sampler("heun", args.edm_steps, "edm")
    return Sampler("ancestral", args.ddpm_steps, "ddpm")


def generate(piece: Piece) -> None:
    """Trains a generator and samples its images, block by block. Image k has the label k modulo 10."""
    args, compute, generator = piece.args, piece.compute, piece.args.name
    denoiser, sampler = train_denoiser(piece, generator), sampler_of(generator, args)
    blocks = [slice(k, min(k + args.block, args.images)) for k in range(0, args.images, args.block)]
    for block in blocks:
        path = block_path(piece, generator, block)
        if path.exists():
            continue
        if piece.clock.over():
            raise WorkLeft
        indices = np.arange(block.start, block.stop)

        def noise(purpose: str, indices: np.ndarray = indices) -> Tensor:  # [B] -> [B, C, H, W]
            return compute.to_device(seeds.normals(piece.seed, purpose, indices, (1, SIZE, SIZE), compute.device))

        labels = torch.from_numpy(indices % CLASSES).to(compute.device)
        with compute.autocast():
            images = SAMPLERS[sampler.name](
                denoiser, noise("latents"), labels, sampler, lambda step: noise(f"churn/{step}")
            )
        with files.writing(path) as file:
            np.save(file, to_bytes(images))
        print(f"{generator}: {block.stop:,} of {args.images:,} images", flush=True)


def block_path(piece: Piece, generator: str, block: slice) -> Path:
    """The file of a block of generated images."""
    return piece.folder / f"{generator}-{block.start:08d}.npy"


def generated_images(piece: Piece, generator: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a generator, uint8 [N, H, W, C], and their labels, int64 [N]."""
    count, size = piece.args.images, piece.args.block
    paths = [block_path(piece, generator, slice(k, min(k + size, count))) for k in range(0, count, size)]
    if missing := [path for path in paths if not path.exists()]:
        sys.exit(f"{missing[0]} does not exist; expected it from `generate {generator}`; run that first")
    return np.concatenate([np.load(path) for path in paths]), np.arange(count) % CLASSES


def new_classifier(piece: Piece) -> nn.Module:
    """A classifier with its initial weights, on the device."""
    pixels = piece.real[0] / 255
    spec = DataSpec(CLASSES, 1, (float(pixels.mean()),), (float(pixels.std()),))
    seeds.reseed_torch(piece.seed, "initial weights", 0)
    return piece.compute.model_to_device(wide_resnet(spec, piece.args.depth, piece.args.width, "silu"))


def train(piece: Piece) -> None:
    """Trains the classifier of an arm by TRADES, or resumes."""
    args, compute, path = piece.args, piece.compute, piece.folder / f"arm-{piece.args.name}.safetensors"
    if path.exists():
        return
    generator = ARMS[args.name]
    real, generated = piece.real, generated_images(piece, generator) if generator else None
    mix = Mix(
        len(real[1]), len(generated[1]) if generated else 0, args.batch, args.generated_share if generated else 0.0
    )
    order, ball = BatchOrder(mix, piece.seed), Ball("linf", args.epsilon)
    settings = losses.LossSettings(ball, args.attack_steps, args.epsilon / 4, args.beta, 0.1)
    model = new_classifier(piece)
    ema_model, steps = copy.deepcopy(model), mix.steps(args.images_seen)
    norms = {id(p) for layer in model.modules() if isinstance(layer, modes.BATCH_NORMS) for p in layer.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if id(p) not in norms], "weight_decay": 5e-4},
    ]
    optimiser = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)

    def train_step(step: int) -> Tensor:
        of_real, of_generated = order.at(step)  # [R], [G]
        images, labels = real[0][of_real], real[1][of_real]
        if generated:
            images = np.concatenate([images, generated[0][of_generated]])
            labels = np.concatenate([labels, generated[1][of_generated]])
        x, y = compute.to_device(to_float(images)), torch.from_numpy(labels).to(compute.device)
        start = losses.draw_start("trades", ball, seeds.stream(piece.seed, "attack/start", step), tuple(x.shape))
        modes.set_batch_norm_momentum(model, 1.0 if step == 0 else 0.01)
        rate, momentum = schedules.one_cycle(step, steps, args.learning_rate)
        for group in optimiser.param_groups:
            group["lr"], group["momentum"] = rate, momentum
        optimiser.zero_grad(set_to_none=True)
        with modes.mode(model, training=True), compute.autocast():
            loss = losses.trades(model, x, y, compute.to_device(start), settings).total.mean()
        loss.backward()
        optimiser.step()
        ema.update(ema_model, model, ema.warmup_decay(step, steps, args.ema_decay))
        ema.copy_buffers(ema_model, model)
        return loss.detach()

    run_steps(piece, f"arm-{args.name}", steps, {"live": model, "ema": ema_model}, optimiser, train_step)
    save_weights(path, ema_model)


def evaluate(piece: Piece) -> None:
    """Attacks the classifier of an arm, one shard of test images after the other, in float32.

    Writes a record per shard: which images are right clean, under PGD-40 (CW margin) and under standard AutoAttack.
    """
    args, compute = piece.args, piece.compute.exact()
    weights = piece.folder / f"arm-{args.name}.safetensors"
    if not weights.exists():
        sys.exit(f"{weights} does not exist; expected it from `train {args.name}`; run that first")
    model, ball = new_classifier(piece), Ball("linf", args.epsilon)
    model.load_state_dict(load_file(weights))
    model.eval().requires_grad_(False)
    suite = auto_attack.suite("standard", CLASSES)
    for number, shard in enumerate(shards_of(piece)):
        path = record_path(piece, args.name, number)
        if path.exists():
            continue
        if piece.clock.over():
            raise WorkLeft
        x = compute.to_device(to_float(piece.test[0][shard]))
        y = torch.from_numpy(piece.test[1][shard]).to(compute.device)
        with torch.no_grad():
            clean = model(x).argmax(1) == y  # [B]
        start = compute.to_device(ball.random_start(seeds.stream(piece.seed, "pgd/start", number), tuple(x.shape)))
        attacked = pgd(model, x, margin(y), ball, start, PGD_STEPS, args.epsilon / 4)
        with torch.no_grad():
            pgd_right = clean & (model(attacked).argmax(1) == y)
        _, broken_by = auto_attack.attack(model, x, y, ball, suite, piece.seed + number, len(y))
        record = {
            "clean": clean.tolist(),
            "pgd": pgd_right.tolist(),
            "auto_attack": (broken_by == auto_attack.ROBUST).tolist(),
            "broken_by": broken_by.tolist(),
        }
        files.write_json(path, record)
        print(f"{args.name}: {shard.stop:,} of {args.test:,} test images", flush=True)


def shards_of(piece: Piece) -> list[slice]:
    """The shards of the test images."""
    return [slice(k, min(k + piece.args.shard, piece.args.test)) for k in range(0, piece.args.test, piece.args.shard)]


def record_path(piece: Piece, arm: str, number: int) -> Path:
    """The record of a shard."""
    return piece.folder / f"evaluation-{arm}-{number:04d}.json"


def compare(piece: Piece) -> None:
    """Writes result.json from the evaluations: accuracies of every complete arm, differences to the first of them."""
    flags: dict[str, dict[str, np.ndarray]] = {}
    for arm in ARMS:
        paths = [record_path(piece, arm, number) for number in range(len(shards_of(piece)))]
        if all(path.exists() for path in paths):
            records = [json.loads(path.read_text()) for path in paths]
            flags[arm] = {
                name: np.concatenate([np.array(record[name]) for record in records])
                for name in ("clean", "pgd", "auto_attack", "broken_by")
            }
        else:
            print(f"{arm}: {sum(path.exists() for path in paths)} of {len(paths)} shards; left out", flush=True)
    measures = ("clean", "pgd", "auto_attack")
    first, *others = flags or sys.exit("no arm is evaluated; expected one at least; run `evaluate` first")
    rng = np.random.default_rng(piece.seed)

    def difference(arm: str, name: str) -> intervals.PairedDifference:
        return intervals.paired_difference([flags[arm][name]], [flags[first][name]], RESAMPLES, rng)

    result = {
        "settings": json.loads((piece.folder / "settings.json").read_text()),
        "compute": piece.compute.describe(),
        "attacks": list(auto_attack.STANDARD),
        "accuracies": {
            arm: {name: intervals.wilson(of[name]).plain() for name in measures} for arm, of in flags.items()
        },
        "broken_by": {arm: np.unique(of["broken_by"], return_counts=True) for arm, of in flags.items()},
        "differences": {f"{arm} - {first}": {name: difference(arm, name) for name in measures} for arm in others},
    }
    text = json.dumps(result, indent=2, default=lambda value: value.tolist())
    files.write_text(piece.folder / "result.json", text)
    print(text)


def plan(piece: Piece) -> None:
    """Prints the counted operations of every piece. They are not seconds: small networks use little of a GPU."""
    args = piece.args
    forward = flops.forward(new_classifier(piece), (1, SIZE, SIZE))
    suite = auto_attack.suite("standard", CLASSES)
    per_image = suite.passes + auto_attack.GRADIENT * PGD_STEPS
    calls = {"edm": 2 * args.edm_steps - 1, "ddpm": args.ddpm_steps}
    denoiser = forward_of_denoiser(piece)
    rows = [(f"generate {name}", denoiser * (3 * args.generator_images_seen + calls[name] * args.images))
            for name in GENERATORS]  # fmt: skip
    training = forward * flops.forward_passes_per_step("trades", args.attack_steps) * args.images_seen
    rows += [(f"train {arm}", training) for arm in ARMS]
    rows += [(f"evaluate {arm}", forward * per_image * args.test) for arm in ARMS]
    for name, operations in rows:
        print(f"{name:20} {operations:.1e} operations")
    print(f"{'all':20} {sum(operations for _, operations in rows):.1e} operations")
    print("AutoAttack is counted as if every image stayed robust.")


def forward_of_denoiser(piece: Piece) -> int:
    """Operations of one forward pass of a denoiser for one image, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    denoiser, device = new_denoiser(piece, "edm"), piece.compute.device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(
            torch.zeros(1, 1, SIZE, SIZE, device=device),
            torch.ones(1, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
    return int(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="of all files of the experiment")
    parser.add_argument("--data", required=True, help="folder with the four IDX files of Fashion-MNIST, plain or .gz")
    parser.add_argument("--seconds", type=float, default=420.0, help="of one command")
    parser.add_argument("--device", default="auto", choices=devices.DEVICES)
    parser.add_argument("--precision", default="auto", choices=devices.PRECISIONS)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", type=int, default=2000, help="real training images")
    parser.add_argument("--test", type=int, default=1000, help="test images, the first of the test split")
    parser.add_argument("--shard", type=int, default=125, help="test images attacked together")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--generator-images-seen", type=int, default=2_000_000)
    parser.add_argument("--generator-batch", type=int, default=256)
    parser.add_argument("--generator-rate", type=float, default=0.001)
    parser.add_argument("--images", type=int, default=50_000, help="generated images of each generator")
    parser.add_argument("--block", type=int, default=1000, help="generated images sampled together")
    parser.add_argument("--edm-steps", type=int, default=18)
    parser.add_argument("--ddpm-steps", type=int, default=250)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--epsilon", type=float, default=0.1, help="of linf, in pixels of [0, 1]")
    parser.add_argument("--beta", type=float, default=5.0)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--images-seen", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--ema-decay", type=float, default=0.995)
    parser.add_argument("--generated-share", type=float, default=0.7)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("generate").add_argument("name", choices=GENERATORS)
    for name in ("train", "evaluate"):
        commands.add_parser(name).add_argument("name", choices=ARMS)
    commands.add_parser("compare")
    commands.add_parser("plan")
    args = parser.parse_args()
    try:
        {"generate": generate, "train": train, "evaluate": evaluate, "compare": compare, "plan": plan}[args.command](
            Piece(args)
        )
    except WorkLeft:
        print("the time is used up; the same command resumes", flush=True)
        sys.exit(EXIT_WORK_LEFT)


if __name__ == "__main__":
    main()
