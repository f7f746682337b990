"""What a run needs, before it is paid for: clips, steps, disk, host memory, the memory and arithmetic of each stage,
how long the whole run takes, and what it costs. With --gpu it says which flags make the run fit, exact ones before
the one that is not, and which make it faster where there is room.

    python tools/plan.py train_cogvideox_lora.py [the flags of the run] [--gpu 4090] [--price 0.5] [--num_processes 8]

The script's own functions run on the meta device, which knows shapes and no values. So a step of the real model takes
seconds without a GPU, its weights are not loaded (only its configs are read), and the counts are exact: the peak of
the tensors that are alive, the bytes that each operation reads and writes, and the operations of matrix products and
attention. What an allocator wastes and what CUDA itself takes (about 0.6 GiB) is not in them, and a compiled block
moves fewer bytes. Seconds are estimates: bytes at the card's bandwidth, operations at 80 % of its peak, and beside
them the copies of --offload_base at 24 GB/s.

The time of the run is that of a new one on an idle machine, without what is none of the stages: loading the models,
waiting for clips that are decoded, saving. A smaller clip is taken to cost less in proportion to its pixels, a little
too much: the arithmetic of attention falls with their square.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import weakref
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import ClassVar
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

# It warns at import that a kernel for CPUs is missing. The scripts silence this, too.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import bitsandbytes  # noqa: E402
import budget  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from cards import CUDA_CONTEXT, GPUS, card_of, gpu_name  # noqa: E402
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel  # noqa: E402
from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from training_script import ending_as, load_script, open_run  # noqa: E402
from transformers import T5Config, T5EncoderModel  # noqa: E402

GIB = 2**30
HOST_LINK = 24e9  # bytes a second from pinned host memory, over PCIe 4.0 with 16 lanes
TRAINING = "a training step"
SAMPLING = "sampling a video"
HELD_OUT = "a held-out loss"
STAGES = {  # what is counted once, and what a run does of it
    "encoding a prompt": "encoding prompts", "encoding a clip": "encoding clips", TRAINING: "training",
    SAMPLING: "samples", HELD_OUT: "held-out losses",
}  # fmt: skip


@dataclasses.dataclass
class Cost:
    """Of a stage: bytes alive at its peak (also by part), bytes of pinned host memory, bytes of weights that are
    loaded into host memory, bytes moved on the device, of which by casts and by matrix products, bytes copied from
    the host by --offload_base, and operations."""

    peak: int = 0
    pinned: int = 0
    loaded: int = 0
    traffic: int = 0
    casts: int = 0
    matrix_traffic: int = 0
    copied: int = 0
    flop: int = 0
    parts: dict[str, int] = dataclasses.field(default_factory=dict)

    def seconds(self, gpu: str) -> float:
        card = GPUS[gpu]
        matrices = max(self.matrix_traffic / card.bandwidth, self.flop / (0.8 * card.rate))
        computing = (self.traffic - self.matrix_traffic) / card.bandwidth + matrices
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


def layout(value) -> tuple:
    """Return all of an operation's argument that its result's layout depends on: of a tensor no values. Raises
    TypeError for what has no layout to be remembered: values on a real device, and single numbers, whose dtype may
    give way to another one."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta or value.dim() == 0:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(layout(item) for item in value)
    return type(value), value  # 1, 1.0 and True are equal, and their results are not


class CostCounter(TorchDispatchMode):
    """Counts, while it is entered, the bytes that live on the device and what each operation reads and writes.

    What torch does for an operation on the meta device takes most of the time. So it is asked once for the same
    operation on the same layouts, and its answer is remembered: `remembered` has the layouts of the results, and what
    the operation costs. Views and operations in place are run each time."""

    remembered: ClassVar[dict] = {}

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
        kwargs = kwargs or {}
        key = None
        if has_new_results(func):
            with contextlib.suppress(TypeError):
                key = func, layout(args), tuple(kwargs), layout(tuple(kwargs.values()))
                hash(key)
        if key in self.remembered:
            layouts, is_single, amounts = self.remembered[key]
            outputs = []
            for size, strides, dtype in layouts:
                outputs.append(torch.empty_strided(size, strides, dtype=dtype, device="meta"))
            result = outputs[0] if is_single else tuple(outputs)
        else:
            result, outputs, amounts = self.measure(func, args, kwargs)
            is_single = isinstance(result, torch.Tensor)
            if key is not None and (is_single or len(outputs) == len(result)) and self.are_new(outputs, args):
                layouts = [(output.shape, output.stride(), output.dtype) for output in outputs]
                self.remembered[key] = layouts, is_single, amounts
        for name, amount in amounts.items():
            setattr(self.cost, name, getattr(self.cost, name) + amount)
        self.watch(*outputs)
        return result

    @staticmethod
    def are_new(outputs: list[torch.Tensor], args: tuple) -> bool:
        """Return whether tensors of the meta device share no memory with arguments. An operation may not declare that
        they do: `_unsafe_view`."""
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        return all(output.is_meta and output.untyped_storage()._cdata not in given for output in outputs)

    @staticmethod
    def measure(func, args: tuple, kwargs: dict) -> tuple[object, list[torch.Tensor], dict[str, int]]:
        """Run an operation. Return its result, the tensors in it, and what is to be added to the costs."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        is_view = all(output.untyped_storage()._cdata in known for output in outputs) and not func._schema.is_mutable
        name = func.__name__
        amounts = {}
        if not is_view and not name.startswith(("empty", "new_empty")):
            moved = sum(elements(tensor) * tensor.element_size() for tensor in inputs + outputs)
            amounts["traffic"] = moved
            if name.startswith(("_to_copy", "copy_")):
                amounts["casts"] = moved
            if operations := FLOP.get(func._overloadpacket):
                amounts["flop"] = operations(*args, **kwargs, out_val=result)
                amounts["matrix_traffic"] = moved
        return result, outputs, amounts


@functools.cache
def has_new_results(func) -> bool:
    """Return whether an operation only returns new tensors: no views, and none that it was given."""
    schema = func._schema
    is_alias = any(returned.alias_info is not None for returned in schema.returns)
    return bool(schema.returns) and not is_alias and not schema.is_mutable


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
        if not args.quantize_base:  # it is quantized on the device, file by file
            counter.cost.loaded = sum(parameter.nbytes for parameter in transformer.parameters())
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
        key = tuple(leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves((args, kwargs)))
        cost, live = counter.cost, counter.live
        before = dataclasses.replace(cost)
        if key not in seen:
            cost.peak = live
            result = function(*args, **kwargs)
            leaves, structure = tree_flatten(result)
            shapes = [as_like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            amounts = [getattr(cost, name) - getattr(before, name) for name in sums]
            seen[key] = shapes, structure, cost.peak - live, amounts
        else:
            shapes, structure, _, amounts = seen[key]
            leaves = [from_like(shape) if isinstance(shape, Like) else shape for shape in shapes]
            result = tree_unflatten(leaves, structure)
            for name, more in zip(sums, amounts, strict=True):
                setattr(cost, name, getattr(cost, name) + more)
        cost.peak = max(before.peak, live + seen[key][2])
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


@functools.cache
def decoding_cost(
    script: ModuleType, vae_config: str, shape: tuple, dtype: torch.dtype, slicing: bool, tiling: bool, small: bool
) -> Cost:
    """Of latents of `shape` [1, C, f, h, w], decoded by a VAE of this config, in JSON, with these options. No flag of
    the training changes it, so that it is counted once."""
    vae = on_meta(lambda: AutoencoderKLCogVideoX.from_config(json.loads(vae_config)), dtype)
    vae.use_slicing = slicing
    vae.use_tiling = tiling
    if small:
        vae.enable_tiling(*script.SMALL_TILES)
    latents = torch.zeros(shape, dtype=dtype, device="meta")
    return count(script, [vae], lambda: vae.decode(latents))


def sampling_cost(
    script: ModuleType, args: Namespace, vae_config: dict, transformer: torch.nn.Module, training: Cost,
    dtype: torch.dtype, limit: float,
) -> Cost:
    """Of a validation video: --num_inference_steps calls of the transformer, with and without the prompt
    (classifier-free guidance), and the decoding. The base and the optimizer's state stay on the device. Where that
    is too much for `limit` bytes, the script decodes in tiles."""
    config, scale = transformer.config, script.pixels_per_latent(vae_config)
    new = functools.partial(torch.zeros, dtype=dtype, device="meta")
    frames = latent_frames(script.frames_4k_plus_1(args.max_num_frames))
    moments = new(1, 2 * vae_config["latent_channels"], frames, args.height // scale, args.width // scale)
    batch = {"moments": moments, "image_moments": moments[:, :, :1]}
    batch["prompt_embeds"] = new(1, config.max_text_seq_length, config.text_embed_dim)
    latents, conditions = script.prepare_batch(batch, config, vae_config, args)  # [1, f, C, h, w]
    conditions.pop("num_padding")
    num_calls = 2 if args.guidance_scale > 1 else 1  # as the pipeline does it, in one batch
    both = torch.cat([latents, conditions.pop("image_latents", latents[:, :, :0])], dim=2).to(dtype)
    both = both.expand(num_calls, -1, -1, -1, -1)
    conditions["encoder_hidden_states"] = batch["prompt_embeds"].expand(num_calls, -1, -1)
    timesteps = new(num_calls).long()
    vae = new_vae(args, vae_config, dtype)
    cost = count(script, [transformer.eval(), vae], lambda: transformer(both, timestep=timesteps, **conditions))
    held = training.parts["base"] + training.parts["LoRA"] + training.parts["optimizer"]
    whole_frames = args.height * args.width * script.DECODED_PIXEL * dtype.itemsize
    is_small = needs_tiles(script, args, held + whole_frames, limit)
    compressed = latents.permute(0, 2, 1, 3, 4)  # [1, C, f, h, w]
    decoding = decoding_cost(
        script, json.dumps(dict(vae_config), sort_keys=True), tuple(compressed.shape), dtype,
        args.enable_slicing, args.enable_tiling, is_small,
    )
    denoising = cost.peak + training.parts["optimizer"]
    cost.peak = max(denoising, decoding.peak + held)
    for name in ("traffic", "matrix_traffic", "copied", "flop"):
        setattr(cost, name, args.num_inference_steps * getattr(cost, name) + getattr(decoding, name))
    cost.parts = {"denoising": denoising, "decoding": decoding.peak + held}
    return cost


def held_out_cost(
    script: ModuleType, args: Namespace, vae_config: dict, transformer: torch.nn.Module, training: Cost,
    dtype: torch.dtype, shape: tuple,
) -> Cost:
    """Of the loss of a held-out clip of latents of `shape` (f, h, w), at one noise level: a forward pass alone, and
    one clip at a time."""
    config = transformer.config
    new = functools.partial(torch.zeros, dtype=dtype, device="meta")
    channels, (frames, height, width) = 2 * vae_config["latent_channels"], shape
    batch = {"moments": new(1, channels, frames, height, width), "image_moments": new(1, channels, 1, height, width)}
    batch["prompt_embeds"] = new(1, config.max_text_seq_length, config.text_embed_dim)
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    args = Namespace(**vars(args) | {"noised_image_dropout": 0})

    def loss():
        latents, conditions = script.prepare_batch(batch, config, vae_config, args)
        return script.diffusion_loss(transformer, scheduler, latents, conditions)

    cost = count(script, [transformer.eval()], loss)
    cost.peak += training.parts["optimizer"]
    return cost


def new_vae(args: Namespace, vae_config: dict, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    vae = on_meta(lambda: AutoencoderKLCogVideoX.from_config(vae_config), dtype)
    vae.use_slicing, vae.use_tiling = args.enable_slicing, args.enable_tiling
    return vae


def new_text_encoder(config: dict, dtype: torch.dtype) -> T5EncoderModel:
    """Return T5 without values, in the dtypes in which transformers loads it."""
    text_encoder = on_meta(lambda: T5EncoderModel(T5Config(**config)), dtype)
    if dtype == torch.float16:  # transformers keeps these in fp32
        for block in text_encoder.encoder.block:
            block.layer[-1].DenseReluDense.wo.float()
    return text_encoder


def prompt_cost(script: ModuleType, configs: dict, dtype: torch.dtype, is_on_host: bool) -> Cost:
    """Of a prompt, with the whole text encoder on the device or with two of its blocks."""
    text_encoder = new_text_encoder(configs["text_encoder"], dtype)
    tokens = torch.zeros(1, configs["transformer"]["max_text_seq_length"], dtype=torch.int64, device="meta")
    loaded = sum(parameter.nbytes for parameter in text_encoder.parameters())
    models = [text_encoder]
    if is_on_host:
        script.place_text_encoder(text_encoder, torch.device("meta"))
        models = [text_encoder.encoder.block, text_encoder.encoder.final_layer_norm]
    cost = count(script, models, lambda: text_encoder(tokens))
    cost.loaded = loaded
    return cost


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
    """Of a training step on clips of latents of `shape` (f, h, w), and of sampling a video and of the loss of a
    held-out clip where the run does that; and the number of trained parameters."""
    cost, transformer = training_cost(script, args, configs["transformer"], configs["vae"], shape, dtype)
    costs = {TRAINING: cost}
    if args.validation_prompt and args.num_validation_videos:
        costs[SAMPLING] = sampling_cost(script, args, configs["vae"], transformer, cost, dtype, limit)
    if args.eval_split:
        costs[HELD_OUT] = held_out_cost(script, args, configs["vae"], transformer, cost, dtype, shape)
    return costs, sum(parameter.numel() for parameter in script.lora_parameters(transformer).values())


def fits(costs: dict[str, Cost], limit: float) -> bool:
    return all(cost.peak <= limit for cost in costs.values())


def what_fits(
    script: ModuleType, args: Namespace, costs_of: Callable, limit: float
) -> tuple[Namespace, dict[str, Cost]]:
    """Return `args` with the flags, the cheapest first, that make each of the costs of `costs_of(args)` at most
    `limit`, and these costs. Where there is room, attention is kept, which leaves less to compute. If no flags are
    enough, the costs are those with all flags that help."""
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
        if fits(costs, limit):
            break
    if fits(costs, limit) and changed.gradient_checkpointing:
        faster = Namespace(**vars(changed) | {"checkpoint_policy": "attention"})
        more = costs_of(faster)
        if fits(more, limit):
            changed, costs = faster, more
    return changed, costs


def flag_words(args: Namespace, changed: Namespace) -> str:
    """Return the flags of `changed` that differ from `args`, as they are typed."""
    given = {name: value for name, value in vars(changed).items() if value != getattr(args, name)}
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())


def advice(args: Namespace, changed: Namespace, costs: dict[str, Cost], limit: float) -> str:
    """Return what is said of the flags that `what_fits` found."""
    words = flag_words(args, changed)
    lines = [f"What fits: {words}"]
    if not fits(costs, limit):
        lines = ["No flags make it fit. Take fewer or smaller frames.", f"The least is with {words}"]
    lines += [f"  {stage}: {cost.peak / GIB:.1f} GiB" for stage, cost in costs.items()]
    if pinned := costs[TRAINING].pinned:
        lines.append(f"  {pinned / GIB:.1f} GiB of pinned host memory for each process")
    return "\n".join(lines)


def what_is_faster(args: Namespace, costs_of: Callable, limit: float, gpu: str) -> list[dict]:
    """Return what a step of a run that fits would take if less were recomputed: with attention kept, and without any
    recomputation, which --offload_base and --offload_activations need."""
    if not args.gradient_checkpointing:
        return []
    changes = {}
    if args.checkpoint_policy == "full":
        changes["--checkpoint_policy attention"] = {"checkpoint_policy": "attention"}
    nothing = {"gradient_checkpointing": False, "checkpoint_policy": "full"}
    nothing |= {"offload_base": False, "offload_activations": False}
    left_out = [f"--{name}" for name, value in nothing.items() if getattr(args, name) != value]
    changes[f"without {' '.join(left_out)}"] = nothing
    cost = costs_of(args)[TRAINING]
    found = []
    for words, change in changes.items():
        tried = costs_of(Namespace(**vars(args) | change))
        less = tried[TRAINING]
        row = {"flags": words, "fits": fits(tried, limit), "peak": max(each.peak for each in tried.values())}
        row["flop saved"] = cost.flop - less.flop
        if gpu in GPUS:
            row["seconds saved"] = cost.seconds(gpu) - less.seconds(gpu)
        found.append(row)
    return found


def schedule(script: ModuleType, args: Namespace, shapes: list, num_prompts: int, num_processes: int) -> dict:
    """Return how often the process that has the most to do does each stage: `times`, and `amounts`, where a smaller
    clip or batch counts for less than one. `shapes` are those of the clips' latents, (f, h, w), and `num_prompts` the
    number of prompts that are encoded."""
    trained = dict(list(enumerate(shapes))[args.eval_split :])  # which ones are held out is drawn by the seed
    sampler = script.ShapeBatchSampler(
        trained, args.train_batch_size, 0, args.random_flip, num_processes=num_processes
    )
    steps_an_epoch = math.ceil(len(sampler) / args.gradient_accumulation_steps)
    steps = args.num_train_epochs * steps_an_epoch if args.max_train_steps is None else args.max_train_steps
    sizes = [math.prod(shape) for shape in shapes]
    batches = [sum(sizes[index] for index, *_ in batch) for batch in sampler.all_batches()]
    # Those of all processes at the same time: they wait for the largest one.
    epoch = sum(max(batches[start : start + num_processes]) for start in range(0, len(batches), num_processes))
    flips = 2 if args.random_flip else 1
    clips = max(sum(sizes[first::num_processes]) for first in range(num_processes))
    validations = budget.num_validations(args, steps, steps_an_epoch)
    validation_prompts = len(script.validation_inputs(args))
    times = {
        "encoding a prompt": budget.share(num_prompts, num_processes),
        "encoding a clip": flips * budget.share(len(shapes), num_processes),
        TRAINING: budget.num_micro_batches(args, steps, len(sampler)),
        SAMPLING: validations * budget.samples_a_validation(args, validation_prompts, num_processes),
        HELD_OUT: validations * budget.share(args.eval_split, num_processes) * budget.NUM_NOISE_LEVELS,
    }
    amounts = times | {"encoding a clip": flips * clips / max(sizes)}
    amounts[TRAINING] = times[TRAINING] * epoch / (len(sampler) * args.train_batch_size * max(sizes))
    return {
        "steps": steps, "steps an epoch": steps_an_epoch, "validations": validations,
        "samples": validations * validation_prompts * args.num_validation_videos, "times": times, "amounts": amounts,
    }  # fmt: skip


def of_the_run(costs: dict[str, Cost], amounts: dict[str, float], price: float | None, num_processes: int) -> dict:
    """Return the seconds of each stage of the whole run on each card, and with a price of a GPU hour what they cost.
    A price is that of all processes."""
    found = {"run": {}}
    for name in GPUS:
        seconds = {STAGES[stage]: amounts[stage] * cost.seconds(name) for stage, cost in costs.items()}
        found["run"][name] = seconds | {"total": sum(seconds.values())}
    if price is not None:
        hourly = price * num_processes
        found["price"] = {
            name: {stage: hourly * each / 3600 for stage, each in run.items()} for name, run in found["run"].items()
        }
    return found


def less_sampling(args: Namespace, run: dict[str, float], validations: int) -> list[str]:
    """Return which flag makes the samples take less of the time, where they take more than a fifth of it. `run` has
    the seconds of the stages."""
    part = run.get("samples", 0) / run["total"] if run["total"] else 0
    if part <= 0.2:
        return []
    if validations > 2:
        name = "validation_steps" if args.validation_steps else "validation_epochs"
        flag = f"a larger --{name} than {getattr(args, name)}"
    elif args.num_validation_videos > 1:
        flag = f"a smaller --num_validation_videos than {args.num_validation_videos}"
    else:
        flag = f"a smaller --num_inference_steps than {args.num_inference_steps}, or fewer prompts"
    return [f"Samples take {part:.0%} of the time: {flag} lowers it."]


def notes_on(gpu: str, dtype: torch.dtype) -> list[str]:
    """Return what a reader must know of the numbers for this card."""
    notes = []
    if gpu not in GPUS:
        usable = f"{card_of(gpu).memory:.1f} GiB"
        notes.append(f"Of {gpu} GB, {usable} are taken to be usable. A card with ECC has less: give its name.")
        notes.append("Its speed is not known: for times and prices, give --gpu a name.")
    elif GPUS[gpu].is_turing:
        notes.append(f"torch has no flash attention for the {gpu}: it takes longer than is said here.")
        if dtype == torch.bfloat16:
            notes.append(f"The {gpu} has no bf16: it is emulated, and far slower. Take --mixed_precision fp16.")
    if gpu in GPUS and dtype == torch.float32:
        notes.append("In fp32 a run takes far longer: all times are those of half precision.")
    return notes


def host_memory(costs: dict[str, Cost]) -> dict[str, int]:
    """Return the bytes of host memory that a process needs for weights and for what waits there. Each encoder is freed
    before the transformer is loaded."""
    found = {
        "text encoder": costs["encoding a prompt"].loaded, "transformer, while it is loaded": costs[TRAINING].loaded,
        "pinned": costs[TRAINING].pinned,
    }  # fmt: skip
    return found | {"most": max(found.values())}


def on_the_disk(args: Namespace, timetable: dict, num_prompts: int, num_parameters: int, encoded: int) -> dict:
    """Return the bytes on the disk by kind, at most, and how many files of each kind are kept. `num_prompts` are those
    of the validation, and `encoded` the bytes of encoded clips and prompts."""
    steps = timetable["steps"]
    kept = {
        "checkpoints": budget.checkpoints(args, steps, num_parameters, state_bytes(args, num_parameters)),
        "LoRAs": budget.loras(args, steps, timetable["validations"], num_prompts, num_parameters),
    }
    disk = {"encoded clips and prompts": encoded} | {kind: files.size for kind, files in kept.items()}
    return {
        "disk for encoded clips": encoded,
        "disk": disk | {"total": sum(disk.values())},
        "kept": {kind: files._asdict() for kind, files in kept.items()},
    }


def plan(
    script: ModuleType, args: Namespace, num_processes: int = 1, gpu: str | None = None, price: float | None = None
) -> dict:
    """All that is printed, by name. Raises the script's RunError for flags, data or a model that cannot work."""
    transformer_config, vae_config, dataset = open_run(script, args)
    if args.eval_split >= len(dataset):
        raise script.RunError(f"--eval_split {args.eval_split} leaves nothing of {len(dataset)} clips to train on")
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
    validation_prompts = [sampled_from["prompt"] for sampled_from in script.validation_inputs(args)]
    prompts = {dataset.prompt(index) for index in range(len(dataset))} | {*validation_prompts, ""}

    def schedule_of(tried: Namespace) -> dict:
        return schedule(script, tried, shapes, len(prompts), num_processes)

    limit = card_of(gpu).limit * GIB if gpu else math.inf
    largest = max(shapes, key=math.prod)
    encoding = encoding_costs(script, args, configs, largest, dtype, limit)
    training, num_parameters = training_costs(script, args, configs, largest, dtype, limit)
    costs = encoding | training
    timetable = schedule_of(args)
    encoded = sum(sizes) + prompt * len(prompts)
    found = {
        "clips": {f"{4 * f - 3} x {scale * h} x {scale * w}": n for (f, h, w), n in sorted(Counter(shapes).items())},
        **timetable,
        "trained parameters": num_parameters,
        "processes": num_processes,
        "pinned host memory": training[TRAINING].pinned,
        "host memory": host_memory(costs),
        **on_the_disk(args, timetable, len(validation_prompts), num_parameters, encoded),
        "stages": {stage: dataclasses.asdict(cost) for stage, cost in costs.items()},
        "seconds": {name: {stage: cost.seconds(name) for stage, cost in costs.items()} for name in GPUS},
        **of_the_run(costs, timetable["amounts"], price, num_processes),
    }
    if gpu is None:
        return found
    counted = {str(vars(args)): training}  # by the flags, since the same ones may be tried twice

    def costs_of(tried: Namespace) -> dict[str, Cost]:
        key = str(vars(tried))
        if key not in counted:
            counted[key] = training_costs(script, tried, configs, largest, dtype, limit)[0]
        return counted[key]

    found["notes"] = notes_on(gpu, dtype)
    found["fit"] = {stage: cost.peak <= limit for stage, cost in costs.items()}
    advised = args
    if fits(training, limit):
        found["faster"] = what_is_faster(args, costs_of, limit, gpu)
    else:
        changed, less = what_fits(script, args, costs_of, limit)
        found["advice"] = advice(args, changed, less, limit)
        if fits(less, limit):
            advised = changed
            if changed.offload_base != args.offload_base:  # the encoders are counted in another way then, too
                encoding = encoding_costs(script, changed, configs, largest, dtype, limit)
            less = encoding | less
            found["advised"] = {
                "flags": flag_words(args, changed),
                **schedule_of(changed),
                "host memory": host_memory(less),
                "stages": {stage: dataclasses.asdict(cost) for stage, cost in less.items()},
                **of_the_run(less, schedule_of(changed)["amounts"], price, num_processes),
            }
    if gpu in GPUS:
        of_run = found.get("advised", found)
        found["notes"] += less_sampling(advised, of_run["run"][gpu], of_run["validations"])
    return found


def table(rows: list[list[str]]) -> list[str]:
    """Return the rows as lines, in columns. The first column is set to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < GIB else f"{size / GIB:.1f} GiB"


def report_needs(found: dict) -> list[str]:
    """Return the lines on clips, steps, disk and host memory."""
    clips = ", ".join(f"{number} of {size}" for size, number in found["clips"].items())
    lines = [f"clips      {clips}", f"steps      {found['steps']} ({found['steps an epoch']} an epoch)"]
    lines.append(f"LoRA       {found['trained parameters']:,} parameters")
    if found["samples"]:
        lines.append(f"samples    {found['samples']} videos, of {found['validations']} validations")
    disk, kept = found["disk"], found["kept"]
    lines.append(f"disk       {gib(disk['total'])} in all, without the model, videos and logs")
    lines.append(f"           {gib(disk['encoded clips and prompts'])} for encoded clips and prompts")
    for kind, files in kept.items():
        most = f", {files['most']} while one is written" if files["most"] > files["number"] else ""
        lines.append(f"           {gib(disk[kind])} for {kind}: {files['number']} are kept{most}")
    host = found.get("advised", found)["host memory"]
    lines.append(f"host       {gib(host['most'])} of memory for each process, the largest of these:")
    lines.append(f"           {gib(host['text encoder'])} for T5's weights, while prompts are encoded")
    if loaded := host["transformer, while it is loaded"]:
        lines.append(f"           {gib(loaded)} for the transformer's weights, while they are loaded")
    if host["pinned"]:
        lines.append(f"           {gib(host['pinned'])} of pinned memory, while it trains")
    lines.append("           not counted: Python, torch and CUDA, clips that are being decoded, the page cache")
    return lines


def report_stages(found: dict, gpu: str | None) -> list[str]:
    """Return the table of what each stage takes once, and whether that fits."""
    rows = [["once", "peak, GiB", "TFLOP", "GiB moved", *([f"seconds on {gpu}"] if gpu in GPUS else [])]]
    for stage, cost in found["stages"].items():
        peak = f"{cost['peak'] / GIB:.1f}"
        rows.append([stage, peak, f"{cost['flop'] / 1e12:,.1f}", f"{cost['traffic'] / GIB:,.0f}"])
        if gpu in GPUS:
            rows[-1].append(f"{found['seconds'][gpu][stage]:,.1f}")
    lines = ["", *table(rows), ""]
    lines.append("The peaks are made of, in GiB:")
    for stage, cost in found["stages"].items():
        lines.append(f"  {stage}: " + ", ".join(f"{part} {size / GIB:.1f}" for part, size in cost["parts"].items()))
    if gpu:
        lines.append("")
    for stage, is_enough in found.get("fit", {}).items():
        verdict = "fits" if is_enough else "does not fit"
        lines.append(f"{stage}: {verdict} ({gpu}, {card_of(gpu).memory:.1f} GiB)")
    if "advice" in found:
        lines.append(found["advice"])
    for row in found.get("faster", []):
        saved = f"{row['flop saved'] / 1e12:,.1f} TFLOP"
        if "seconds saved" in row:
            saved += f" and {row['seconds saved']:,.1f} seconds"
        if row["fits"]:
            lines.append(f"Faster: {row['flags']} fits ({row['peak'] / GIB:.1f} GiB), and saves {saved} a step")
        else:
            lines.append(f"Not faster here: {row['flags']} would take {row['peak'] / GIB:.1f} GiB")
    return lines


def report_run(found: dict, gpu: str) -> list[str]:
    """Return the table of what the whole run takes on this card: with the advised flags, if it needs some."""
    of_run = found.get("advised", found)
    seconds, prices = of_run["run"][gpu], of_run.get("price", {}).get(gpu)
    cards = f"{found['processes']} x {gpu}" if found["processes"] > 1 else gpu
    flags = f" with {of_run['flags']}" if "advised" in found else ""
    rows = [["stage", "times", "each", "time", "part", *(["price"] if prices else [])]]
    for stage, label in STAGES.items():
        if label in seconds:
            times = of_run["times"][stage]
            each = budget.duration(seconds[label] / times) if times else ""
            part = f"{seconds[label] / seconds['total']:.0%}" if seconds["total"] else ""
            rows.append([label, f"{times:,}", each, budget.duration(seconds[label]), part])
    rows.append(["total", "", "", budget.duration(seconds["total"]), ""])
    if prices:
        rows = [rows[0]] + [[*row, f"{prices[row[0]]:,.2f}"] for row in rows[1:]]
    return ["", f"The whole run on {cards}{flags}, estimated:", *table(rows)]


def report_cards(found: dict) -> list[str]:
    """Return the table of what the whole run takes on each card."""
    stages = list(next(iter(found["run"].values())))
    rows = [["", *stages, *(["price"] if "price" in found else [])]]
    for name, seconds in found["run"].items():
        rows.append([name, *(budget.duration(seconds[stage]) for stage in stages)])
        if "price" in found:
            rows[-1].append(f"{found['price'][name]['total']:,.2f}")
    return ["", "The whole run on each card, estimated. Whether it fits is said with --gpu:", *table(rows)]


def report(found: dict, gpu: str | None) -> str:
    """What `plan` found, for people."""
    lines = report_needs(found) + report_stages(found, gpu)
    if gpu is None:
        lines += report_cards(found)
    elif gpu in GPUS:
        lines += report_run(found, gpu)
    return "\n".join(lines + found.get("notes", []))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="the script of the run; its flags follow")
    cards = "a card by its name, or by its GB; say what fits, and which flags make it fit"
    parser.add_argument("--gpu", type=gpu_name, metavar="X", help=f"{cards}: {', '.join(GPUS)}")
    parser.add_argument("--price", type=float, metavar="N", help="what an hour of a GPU costs, in any currency")
    parser.add_argument("--num_processes", type=int, default=1, help="GPUs, each with a process of its own")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    own, flags = parser.parse_known_args(argv)
    if own.num_processes < 1 or (own.price is not None and own.price < 0):
        parser.error("--num_processes must be 1 or more, and --price not less than 0")
    script = load_script(own.script)
    args = script.get_args(flags)
    with ending_as(script, "plan.py"):
        found = plan(script, args, own.num_processes, own.gpu, own.price)
    print(json.dumps(found) if own.json else report(found, own.gpu))


if __name__ == "__main__":
    main()
