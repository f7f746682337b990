"""What a run needs, before it is paid for: clips, steps, disk, and memory, arithmetic and time of each stage. With
--gpu it says which flags make the run fit, exact ones before the one that is not, and which make it faster then.

    python tools/plan.py train_cogvideox_lora.py [the flags of the run] [--gpu 4090] [--num_processes 8] [--json]

The script's own functions run on the meta device, which knows shapes and no values. So a step of the real model takes
seconds without a GPU, its weights are not loaded (only its configs are read), and the counts are exact: the peak of
the tensors that are alive, the bytes that each operation reads and writes, and the operations of matrix products and
attention. What an allocator wastes and what CUDA itself takes (about 0.6 GiB) is not in them, and a compiled block
moves fewer bytes. Seconds are estimates: bytes at the card's bandwidth, operations at 80 % of its peak, and beside
them the copies of --offload_base at 24 GB/s.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import weakref
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import bitsandbytes  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel  # noqa: E402
from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from training_script import ending_as, load_script, open_run  # noqa: E402
from transformers import T5Config, T5EncoderModel  # noqa: E402

GIB = 2**30
GPUS = {  # memory in GiB; published bandwidth in bytes and operations in half precision, without sparsity, per second
    "h200": (139, 4.8e12, 989e12), "h100": (79, 3.35e12, 989e12), "a100": (79, 2.04e12, 312e12),
    "l40s": (44, 0.86e12, 362e12), "4090": (23.5, 1.01e12, 165e12), "3090": (23.5, 0.94e12, 71e12),
    "t4": (14.6, 0.32e12, 65e12),
}  # fmt: skip
CUDA_CONTEXT = 0.6  # GiB that CUDA and its libraries take for themselves
HOST_LINK = 24e9  # bytes a second from pinned host memory, over PCIe 4.0 with 16 lanes


@dataclasses.dataclass
class Cost:
    """Of a stage: bytes alive at its peak (also by part), bytes of pinned host memory, bytes moved, of which by casts
    and by matrix products, bytes copied from the host by --offload_base, and operations."""

    peak: int = 0
    pinned: int = 0
    traffic: int = 0
    casts: int = 0
    matrix_traffic: int = 0
    copied: int = 0
    flop: int = 0
    parts: dict[str, int] = dataclasses.field(default_factory=dict)

    def seconds(self, gpu: str) -> float:
        _, bandwidth, rate = GPUS[gpu]
        matrices = max(self.matrix_traffic / bandwidth, self.flop / (0.8 * rate))
        computing = (self.traffic - self.matrix_traffic) / bandwidth + matrices
        return max(computing, self.copied / HOST_LINK)


def elements(tensor: torch.Tensor) -> int:
    """How many there are in memory: an expanded dimension has one."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def operations_4_bit(tokens: torch.Tensor, _weight: torch.Tensor, shape: tuple[int, int], *_, **__) -> int:
    return 2 * tokens.numel() * shape[0]


FLASH = "_scaled_dot_product_flash_attention"
FLOP = {  # torch 2.11 does not count attention on the CPU; later versions count it as on a GPU
    getattr(torch.ops.aten, f"{FLASH}_for_cpu{end}"): flop_registry[getattr(torch.ops.aten, f"{FLASH}{end}")]
    for end in ("", "_backward")
} | flop_registry | {torch.ops.bitsandbytes.gemm_4bit: operations_4_bit}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Like:
    """In place of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


def as_like(tensor: torch.Tensor) -> Like:
    return Like(tensor.shape, tensor.dtype)


def from_like(like: Like, device: str = "meta") -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device)


class CostCounter(TorchDispatchMode):
    """Counts, while it is entered, the bytes that live on the device and what each operation reads and writes."""

    def __init__(self):
        super().__init__()
        self.cost, self.live, self.storages = Cost(), 0, {}

    def watch(self, *tensors: torch.Tensor) -> None:
        """Count these as alive until they are freed."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key = storage._cdata
            if key not in self.storages:
                self.storages[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.cost.peak = max(self.cost.peak, self.live)
                weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.storages.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        result = func(*args, **kwargs or {})
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        is_view = all(output.untyped_storage()._cdata in known for output in outputs) and not func._schema.is_mutable
        name = func.__name__
        if not is_view and not name.startswith(("empty", "new_empty")):
            moved = sum(elements(tensor) * tensor.element_size() for tensor in inputs + outputs)
            self.cost.traffic += moved
            if name.startswith(("_to_copy", "copy_")):
                self.cost.casts += moved
            if operations := FLOP.get(func._overloadpacket):
                self.cost.flop += operations(*args, **kwargs or {}, out_val=result)
                self.cost.matrix_traffic += moved
        self.watch(*outputs)
        return result


def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_) -> torch.Tensor:
    """The kernel that a GPU takes; meta tensors would take the one that writes all scores into memory."""
    if attn_mask is None and query.device.type == "meta":
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    return SDPA(query, key, value, attn_mask, dropout_p, is_causal)


SDPA = F.scaled_dot_product_attention


def pinned_size(nbytes: int) -> int:
    """Return the bytes that torch pins for a tensor: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


@contextlib.contextmanager
def without_host(script: ModuleType, cost: Cost) -> Iterator[None]:
    """The script copies nothing to or from host memory. Of weights, the bytes are counted. Of what a forward pass
    saves, shape and dtype are kept."""
    host_memory = script.host_memory

    def pin(size, dtype, device, is_pinned=True):
        if is_pinned:
            cost.pinned += pinned_size(math.prod(size) * dtype.itemsize)
        return host_memory(size, dtype, device, is_pinned)

    def save(tensor):
        cost.pinned += pinned_size(tensor.nbytes)
        return as_like(tensor)

    def transfer(_blocks, _slot, buffer):
        cost.copied += len(buffer)

    with (
        mock.patch.object(script.HostBlocks, "transfer", transfer),
        mock.patch.multiple(script, host_memory=pin, to_host=save, to_device=from_like),
    ):
        yield


def on_meta(make: Callable, dtype: torch.dtype) -> torch.nn.Module:
    """The model that `make` makes, without values."""
    with torch.device("meta"):
        model = make()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    return model.eval()


def build_transformer(config: dict, dtype: torch.dtype, quantization_config=None) -> CogVideoXTransformer3DModel:
    """A transformer without values. Its layers are quantized as diffusers and bitsandbytes do it."""
    transformer = on_meta(lambda: CogVideoXTransformer3DModel.from_config(config), dtype)
    if quantization_config is not None:
        replace_with_bnb_linear(transformer, [], quantization_config=quantization_config)
        for layer in transformer.modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")
                layer.weight = bitsandbytes.nn.Params4bit(weight, False, compress_statistics=False, quant_type="nf4")
                layer.weight = layer.weight._quantize("meta")
                if layer.bias is not None:
                    layer.bias = torch.nn.Parameter(torch.empty(layer.out_features, dtype=dtype, device="meta"), False)
    return transformer


@contextlib.contextmanager
def without_weights(transformer_config: dict) -> Iterator[None]:
    """Where the scripts load a transformer, they get one on the meta device."""

    def load(_class, *, dtype, quantization_config=None, **_):
        return build_transformer(transformer_config, dtype, quantization_config)

    with (
        mock.patch.object(CogVideoXTransformer3DModel, "from_pretrained", classmethod(load)),
        mock.patch.object(F, "scaled_dot_product_attention", flash_attention),
    ):
        yield


def state_bytes(args: Namespace, num_parameters: int) -> int:
    """Of the optimizer, a parameter: two moments in fp32, or in 8 bits with a scale for 256 of them; Prodigy four."""
    each = 16 if args.optimizer == "prodigy" else 2 * (1 + 4 / 256) if args.use_8bit_adam else 8
    return int(each * num_parameters)


def training_cost(
    script: ModuleType, args: Namespace, transformer_config: dict, vae_config: dict, shape: tuple, dtype: torch.dtype,
    device: str = "meta",
) -> tuple[Cost, torch.nn.Module]:
    """Of one training step on batches of latents of `shape` (f, h, w), and the transformer with its LoRA. On the meta
    device it has no weights; on another it is the real one."""
    counter, batch_size = CostCounter(), args.train_batch_size
    with contextlib.ExitStack() as stack:
        if device == "meta":
            stack.enter_context(without_weights(transformer_config))
            stack.enter_context(without_host(script, counter.cost))
        transformer = script.load_transformer(args, dtype)
        lora = script.add_lora(transformer, args.rank, args.lora_alpha, args.lora_target_modules, args.lora_blocks)
        num_parameters = sum(parameter.numel() for parameter in lora)
        script.place_transformer(args, transformer, torch.device(device))
        tensors = dict(itertools.chain(transformer.named_parameters(), transformer.named_buffers()))
        scales = [tensor.quant_state.absmax for tensor in tensors.values() if hasattr(tensor, "quant_state")]
        counter.watch(*(tensor for name, tensor in tensors.items() if "lora_" not in name))
        counter.watch(*scales)
        parts = {"base": counter.live}
        counter.watch(*lora)
        parts |= {"LoRA": counter.live - parts["base"], "gradients": 4 * num_parameters}
        optimizer = torch.empty(state_bytes(args, num_parameters), dtype=torch.uint8, device=device)
        counter.watch(optimizer)
        parts["optimizer"] = optimizer.nbytes
        if args.gradient_accumulation_steps > 1:  # those of the micro-batches before
            for parameter in lora:
                parameter.grad = torch.empty_like(parameter)
            counter.watch(*(parameter.grad for parameter in lora))
        scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
        new = lambda *sizes: torch.zeros(batch_size, *sizes, dtype=dtype, device=device)  # noqa: E731
        channels, (frames, height, width) = 2 * vae_config["latent_channels"], shape
        batch = {"moments": new(channels, frames, height, width), "image_moments": new(channels, 1, height, width)}
        config = transformer.config
        batch["prompt_embeds"] = new(config.max_text_seq_length, config.text_embed_dim)
        transformer.train()
        with counter:
            latents, conditions = script.prepare_batch(batch, config, vae_config, args)
            with script.saving_activations(args):
                loss = script.diffusion_loss(transformer, scheduler, latents, conditions)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lora, args.max_grad_norm)
    counter.cost.traffic += 3 * 4 * num_parameters + 2 * optimizer.nbytes  # of the optimizer: all is read, and written
    parts["activations"] = counter.cost.peak - sum(parts.values())
    counter.cost.parts = parts
    return counter.cost, transformer


def once_a_shape(function: Callable, counter: CostCounter) -> Callable:
    """`function` of tensors without values. For shapes that it was called with before, what it took then is added: a
    VAE's decoder is called for each tile and each few frames, hundreds of times for a clip."""
    seen, sums = {}, ("traffic", "casts", "matrix_traffic", "flop")

    def remembered(*args, **kwargs):
        key = str(tree_map_only(torch.Tensor, lambda tensor: tuple(tensor.shape), (args, kwargs)))
        cost, live = counter.cost, counter.live
        before = dataclasses.replace(cost)
        if key not in seen:
            cost.peak = live
            result = function(*args, **kwargs)
            shapes = tree_map_only(torch.Tensor, as_like, result)
            seen[key] = shapes, cost.peak - live, [getattr(cost, name) - getattr(before, name) for name in sums]
        else:
            result = tree_map_only(Like, from_like, seen[key][0])
            for name, more in zip(sums, seen[key][2], strict=True):
                setattr(cost, name, getattr(cost, name) + more)
        cost.peak = max(before.peak, live + seen[key][1])
        return result

    return remembered


def count(script: ModuleType, models: list[torch.nn.Module], function: Callable) -> Cost:
    """Of a function without gradients, with these models of the script on the device."""
    counter = CostCounter()
    vaes = [model for model in models if isinstance(model, AutoencoderKLCogVideoX)]
    counter.watch(*(tensor for model in models for tensor in (*model.parameters(), *model.buffers())))
    parts = {"weights": counter.live}
    with contextlib.ExitStack() as stack:
        for coder in (coder for vae in vaes for coder in (vae.encoder, vae.decoder)):
            stack.enter_context(mock.patch.object(coder, "forward", once_a_shape(coder.forward, counter)))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", flash_attention))
        stack.enter_context(without_host(script, counter.cost))
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        function()
    counter.cost.parts = parts | {"activations": counter.cost.peak - parts["weights"]}
    return counter.cost


def latent_frames(frames: int) -> int:
    return (frames - 1) // 4 + 1


def needs_tiles(script: ModuleType, args: Namespace, size: float, limit: float) -> bool:
    """Return what the script's function of this name does, for a card of which CUDA leaves `limit` bytes."""
    return args.offload_base or limit + CUDA_CONTEXT * GIB < size + script.OTHER_MEMORY


def sampling_cost(
    script: ModuleType, args: Namespace, vae: torch.nn.Module, transformer: torch.nn.Module, training: Cost,
    limit: float,
) -> Cost:
    """Of a validation video: --num_inference_steps calls of the transformer, each with and without the prompt
    (classifier-free guidance), and the decoding. The base and the optimizer's state stay on the device. Where that
    is too much for `limit` bytes, the script decodes in tiles."""
    config, scale = transformer.config, script.pixels_per_latent(vae.config)
    new = functools.partial(torch.zeros, dtype=vae.dtype, device="meta")
    frames = latent_frames(script.frames_4k_plus_1(args.max_num_frames))
    moments = new(1, 2 * vae.config.latent_channels, frames, args.height // scale, args.width // scale)
    batch = {"moments": moments, "image_moments": moments[:, :, :1]}
    batch["prompt_embeds"] = new(1, config.max_text_seq_length, config.text_embed_dim)
    latents, conditions = script.prepare_batch(batch, config, vae.config, args)  # [1, f, C, h, w]
    conditions.pop("num_padding")
    both = torch.cat([latents, conditions.pop("image_latents", latents[:, :, :0])], dim=2).to(vae.dtype)
    conditions["encoder_hidden_states"] = batch["prompt_embeds"].expand(2, -1, -1)
    timesteps = new(2).long()
    both = both.expand(2, -1, -1, -1, -1)
    cost = count(script, [transformer.eval(), vae], lambda: transformer(both, timestep=timesteps, **conditions))
    held = training.parts["base"] + training.parts["LoRA"] + training.parts["optimizer"]
    whole_frames = args.height * args.width * script.DECODED_PIXEL * vae.dtype.itemsize
    if needs_tiles(script, args, held + whole_frames, limit):
        vae.enable_tiling(*script.SMALL_TILES)
    compressed = latents.permute(0, 2, 1, 3, 4).to(vae.dtype)  # [1, C, f, h, w]
    decoding = count(script, [vae], lambda: vae.decode(compressed))
    denoising = cost.peak + training.parts["optimizer"]
    cost.peak = max(denoising, decoding.peak + held)
    for name in ("traffic", "matrix_traffic", "copied", "flop"):
        setattr(cost, name, args.num_inference_steps * getattr(cost, name) + getattr(decoding, name))
    cost.parts = {"denoising": denoising, "decoding": decoding.peak + held}
    return cost


def new_vae(args: Namespace, vae_config: dict, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    vae = on_meta(lambda: AutoencoderKLCogVideoX.from_config(vae_config), dtype)
    vae.use_slicing, vae.use_tiling = args.enable_slicing, args.enable_tiling
    return vae


def prompt_cost(script: ModuleType, configs: dict, dtype: torch.dtype, is_on_host: bool) -> Cost:
    """Of a prompt, with the whole text encoder on the device or with two of its blocks."""
    text_encoder = on_meta(lambda: T5EncoderModel(T5Config(**configs["text_encoder"])), dtype)
    if dtype == torch.float16:  # transformers keeps these in fp32
        for block in text_encoder.encoder.block:
            block.layer[-1].DenseReluDense.wo.float()
    tokens = torch.zeros(1, configs["transformer"]["max_text_seq_length"], dtype=torch.int64, device="meta")
    models = [text_encoder]
    if is_on_host:
        script.place_text_encoder(text_encoder, torch.device("meta"))
        models = [text_encoder.encoder.block, text_encoder.encoder.final_layer_norm]
    return count(script, models, lambda: text_encoder(tokens))


def encoding_costs(
    script: ModuleType, args: Namespace, configs: dict, shape: tuple, dtype: torch.dtype, limit: float
) -> dict[str, Cost]:
    """Of a prompt and of a clip of latents of `shape` (f, h, w). A text encoder that does not fit waits on the host,
    and a clip is encoded in tiles, where the script does that."""
    costs = {"encoding a prompt": prompt_cost(script, configs, dtype, args.offload_base)}
    if costs["encoding a prompt"].parts["weights"] > 0.95 * limit:
        costs = {"encoding a prompt": prompt_cost(script, configs, dtype, True)}
    vae, scale = new_vae(args, configs["vae"], dtype), script.pixels_per_latent(configs["vae"])
    frames, height, width = shape
    video = torch.zeros(4 * frames - 3, 3, scale * height, scale * width, dtype=dtype, device="meta")  # [F, C, H, W]
    whole_frames = script.ENCODED_PIXEL * dtype.itemsize * math.prod(video.shape[2:])
    vae.use_tiling = args.enable_tiling or needs_tiles(script, args, whole_frames, limit)
    return costs | {"encoding a clip": count(script, [vae], lambda: script.encode_video(vae, video))}


def training_costs(
    script: ModuleType, args: Namespace, configs: dict, shape: tuple, dtype: torch.dtype, limit: float
) -> tuple[dict[str, Cost], int]:
    """Of a training step on clips of latents of `shape` (f, h, w), and of sampling a video where the run does; and the
    number of trained parameters."""
    cost, transformer = training_cost(script, args, configs["transformer"], configs["vae"], shape, dtype)
    costs = {"a training step": cost}
    if args.validation_prompt:
        vae = new_vae(args, configs["vae"], dtype)
        costs["sampling a video"] = sampling_cost(script, args, vae, transformer, cost, limit)
    return costs, sum(parameter.numel() for parameter in script.lora_parameters(transformer).values())


def what_fits(script: ModuleType, args: Namespace, costs_of: Callable, limit: float) -> str:
    """Say which flags, the cheapest first, make each of the costs of `costs_of(args)` at most `limit`. Where there is
    room, attention is kept, which leaves less to compute."""
    changed, costs = args, costs_of(args)
    for name, value in script.memory_flags(args):
        needed = {"gradient_checkpointing": True} if name in ("offload_base", "offload_activations") else {}
        tried = Namespace(**vars(changed) | needed | {name: value})
        try:
            script.check_args(tried)
        except script.RunError:
            continue  # the flag does not go with those before it
        less = costs_of(tried)
        if any(less[stage].peak < cost.peak for stage, cost in costs.items() if cost.peak > limit):
            changed, costs = tried, less
        if all(cost.peak <= limit for cost in costs.values()):
            break
    is_enough = all(cost.peak <= limit for cost in costs.values())
    if is_enough and changed.gradient_checkpointing:
        faster = Namespace(**vars(changed) | {"checkpoint_policy": "attention"})
        more = costs_of(faster)
        if all(cost.peak <= limit for cost in more.values()):
            changed, costs = faster, more
    given = {name: value for name, value in vars(changed).items() if value != getattr(args, name)}
    words = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())
    peaks = ", ".join(f"{stage} {cost.peak / GIB:.1f} GiB" for stage, cost in costs.items())
    if not is_enough:
        return f"No flags make it fit; with {words}: {peaks}. Take fewer or smaller frames."
    pinned = costs["a training step"].pinned
    memory = f"; {pinned / GIB:.1f} GiB of pinned host memory for each process" if pinned else ""
    return f"What fits: {words} ({peaks}{memory})"


def plan(script: ModuleType, args: Namespace, num_processes: int = 1, gpu: str | None = None) -> dict:
    """All that is printed, by name. Raises the script's RunError for flags, data or a model that cannot work."""
    transformer_config, vae_config, dataset = open_run(script, args)
    configs = {"transformer": transformer_config, "vae": vae_config}
    configs["text_encoder"] = script.read_config(args, "text_encoder")[0]
    dtype = script.DTYPES[args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")]
    scale, channels, shapes = script.pixels_per_latent(vae_config), 2 * vae_config["latent_channels"], []
    for index in range(len(dataset)):
        _, indices, (height, width), _ = dataset.choose(index)
        shapes.append((latent_frames(len(indices)), height // scale, width // scale))
    has_image, flips = transformer_config["in_channels"] > channels // 2, 2 if args.random_flip else 1
    sizes = [channels * flips * (f + has_image) * h * w * dtype.itemsize for f, h, w in shapes]
    prompt = transformer_config["max_text_seq_length"] * transformer_config["text_embed_dim"] * dtype.itemsize
    trained = dict(list(enumerate(shapes))[args.eval_split :])  # which ones are held out is drawn by the seed
    sampler = script.ShapeBatchSampler(
        trained, args.train_batch_size, 0, args.random_flip, num_processes=num_processes
    )
    steps_an_epoch = math.ceil(len(sampler) / args.gradient_accumulation_steps)
    limit = GPUS[gpu][0] - CUDA_CONTEXT if gpu else math.inf
    largest = max(shapes, key=math.prod)
    costs = encoding_costs(script, args, configs, largest, dtype, limit * GIB)
    trained_costs, num_parameters = training_costs(script, args, configs, largest, dtype, limit * GIB)
    costs |= trained_costs
    found = {
        "clips": {f"{4 * f - 3} x {scale * h} x {scale * w}": n for (f, h, w), n in sorted(Counter(shapes).items())},
        "steps an epoch": steps_an_epoch,
        "steps": args.max_train_steps or args.num_train_epochs * steps_an_epoch,
        "trained parameters": num_parameters,
        "pinned host memory": trained_costs["a training step"].pinned,
        "disk for encoded clips": sum(sizes) + prompt * len({dataset.prompt(i) for i in range(len(dataset))} | {""}),
        "stages": {stage: dataclasses.asdict(cost) for stage, cost in costs.items()},
        "seconds": {name: {stage: cost.seconds(name) for stage, cost in costs.items()} for name in GPUS},
    }
    if gpu:
        found["fit"] = {stage: cost.peak / GIB <= limit for stage, cost in costs.items()}
        if not all(found["fit"][stage] for stage in trained_costs):

            def costs_of(tried: Namespace) -> dict[str, Cost]:
                if tried is args:
                    return trained_costs  # counted above
                return training_costs(script, tried, configs, largest, dtype, limit * GIB)[0]

            found["advice"] = what_fits(script, args, costs_of, limit * GIB)
    return found


def report(found: dict, gpu: str | None) -> str:
    """What `plan` found, for people."""
    clips = ", ".join(f"{number} of {size}" for size, number in found["clips"].items())
    lines = [f"clips      {clips}", f"steps      {found['steps']} ({found['steps an epoch']} an epoch)"]
    lines.append(f"LoRA       {found['trained parameters']:,} parameters")
    lines.append(f"disk       {found['disk for encoded clips'] / GIB:.2f} GiB for encoded clips and prompts")
    if found["pinned host memory"]:
        lines.append(f"host       {found['pinned host memory'] / GIB:.1f} GiB of pinned memory for each process")
    shown = [gpu] if gpu else list(GPUS)
    lines.append(f"\n{'':19}{'peak, GiB':>10}{'TFLOP':>9}{'GiB moved':>11}   seconds on {', '.join(shown)}")
    for stage, cost in found["stages"].items():
        seconds = ", ".join(f"{found['seconds'][name][stage]:.1f}" for name in shown)
        numbers = f"{cost['peak'] / GIB:10.1f}{cost['flop'] / 1e12:9.1f}{cost['traffic'] / GIB:11.0f}"
        lines.append(f"{stage:19}{numbers}   {seconds}")
        lines.append(f"{'':4}" + ", ".join(f"{part} {size / GIB:.1f}" for part, size in cost["parts"].items()))
    for stage, is_enough in found.get("fit", {}).items():
        verdict = "fits" if is_enough else "does not fit"
        lines.append(f"{stage}: {verdict} ({gpu}, {GPUS[gpu][0]} GiB)")
    return "\n".join(lines + ([found["advice"]] if "advice" in found else []))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="the script of the run; its flags follow")
    parser.add_argument("--gpu", choices=list(GPUS), help="say what fits, and which flags make it fit")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    own, flags = parser.parse_known_args(argv)
    script = load_script(own.script)
    args = script.get_args(flags)
    with ending_as(script, "plan.py"):
        found = plan(script, args, own.num_processes, own.gpu)
    print(json.dumps(found) if own.json else report(found, own.gpu))


if __name__ == "__main__":
    main()
