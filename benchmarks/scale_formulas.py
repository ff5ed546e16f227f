"""Parameters, operations, memory, exchange and seconds of one step of the trainer, computed from sizes for scale.py.

Sizes come from a `CLIPConfig`: d width, m width between fc1 and fc2, T tokens, L blocks, D embedding, p patch side. A
step of `ContrastivePOTrainer` runs the vision tower forward and backward on two images per pair (the image with a word
and the ordinary image), and the reference forward on the images that are not in its cache. The candidate embeddings
are known. All numbers are for one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

FLOAT, HALF = 4, 2
IMAGES = 2
"""Images per pair that the policy sees: the image with a word, and the ordinary image."""


def _published(
    patch: int,
    vision: tuple[int, int, int, int],
    text: tuple[int, int, int],
    dim: int,
    act: str = "gelu",
    image: int = 224,
) -> CLIPConfig:
    width, inner, blocks, heads = vision
    text_width, text_blocks, text_heads = text
    return CLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "image_size": image,
            "patch_size": patch,
            "hidden_act": act,
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": text_blocks,
            "num_attention_heads": text_heads,
            "hidden_act": act,
        },
        projection_dim=dim,
    )


MODELS = {
    "B/32": _published(32, (768, 3072, 12, 12), (512, 12, 8), 512, "quick_gelu"),
    "B/16": _published(16, (768, 3072, 12, 12), (512, 12, 8), 512, "quick_gelu"),
    "L/14": _published(14, (1024, 4096, 24, 16), (768, 12, 12), 768, "quick_gelu"),
    "L/14-336": _published(14, (1024, 4096, 24, 16), (768, 12, 12), 768, "quick_gelu", 336),
    "H/14": _published(14, (1280, 5120, 32, 16), (1024, 24, 16), 1024),
    "g/14": _published(14, (1408, 6144, 40, 16), (1024, 24, 16), 1024),
    "bigG/14": _published(14, (1664, 8192, 48, 16), (1280, 32, 20), 1280),
}
"""Published sizes as CLIPModel holds them: OpenAI's B and L, LAION's H, g and bigG."""


# ---- Parameters --------------------------------------------------------------------------------------------


def tokens_of(vision: CLIPVisionConfig) -> int:
    """Return T: the patches of an image plus the class token."""
    return (vision.image_size // vision.patch_size) ** 2 + 1


def block_weights(tower: CLIPVisionConfig | CLIPTextConfig) -> int:
    """Return the entries of a block's matrices: 4 d^2 + 2 d m."""
    return 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size


def _block_parameters(tower: CLIPVisionConfig | CLIPTextConfig) -> int:
    biases_and_norms = 9 * tower.hidden_size + tower.intermediate_size
    return block_weights(tower) + biases_and_norms


def vision_parameters(config: CLIPConfig) -> int:
    """Return the parameters of the vision tower and its projection."""
    v = config.vision_config
    patches = 3 * v.patch_size**2 * v.hidden_size
    embeddings = patches + (tokens_of(v) + 1) * v.hidden_size
    norms = 4 * v.hidden_size
    return embeddings + norms + v.num_hidden_layers * _block_parameters(v) + v.hidden_size * config.projection_dim


def text_parameters(config: CLIPConfig) -> int:
    """Return the parameters of the text tower and its projection."""
    t = config.text_config
    embeddings = (t.vocab_size + t.max_position_embeddings) * t.hidden_size
    norms = 2 * t.hidden_size
    return embeddings + norms + t.num_hidden_layers * _block_parameters(t) + t.hidden_size * config.projection_dim


def adapter_parameters(config: CLIPConfig, rank: int, blocks: int) -> int:
    """Return the parameters of LoRA on q_proj and v_proj of `blocks` blocks of the vision tower."""
    return blocks * 2 * 2 * rank * config.vision_config.hidden_size


# ---- Operations --------------------------------------------------------------------------------------------


def _products(tower: CLIPVisionConfig | CLIPTextConfig, tokens: int) -> int:
    """Return the forward operations of a block's matrices. A multiplication and an addition count as two."""
    return 2 * tokens * block_weights(tower)


def _attention(tower: CLIPVisionConfig | CLIPTextConfig, tokens: int) -> int:
    """Return the forward operations of a block's products of queries, keys and values."""
    return 4 * tokens**2 * tower.hidden_size


def _patches(vision: CLIPVisionConfig) -> int:
    return 2 * 3 * vision.patch_size**2 * vision.hidden_size * (tokens_of(vision) - 1)


def image_flops(config: CLIPConfig) -> int:
    """Return the forward operations to embed one image."""
    v = config.vision_config
    block = _products(v, tokens_of(v)) + _attention(v, tokens_of(v))
    return _patches(v) + v.num_hidden_layers * block + 2 * v.hidden_size * config.projection_dim


def text_flops(config: CLIPConfig, tokens: int) -> int:
    """Return the forward operations to embed one text of `tokens` tokens."""
    t = config.text_config
    block = _products(t, tokens) + _attention(t, tokens)
    return t.num_hidden_layers * block + 2 * t.hidden_size * config.projection_dim


@dataclass(frozen=True)
class Step:
    """One optimizer step of one GPU.

    Attributes:
        config: The model.
        pairs: Rows per GPU and micro-batch.
        candidates: Number of candidate texts, shared by all rows.
        gpus: Number of processes.
        rank: Rank of the adapters on q_proj and v_proj. 0 trains the whole vision tower.
        blocks: Number of blocks with adapters, counted from the last. 0 means all.
        seen: Images of a pair that the reference sees in each step: 0 if all are fixed and cached, 1 if the
            attack is redrawn, 2 if nothing is cached (a stream).
        bf16: Whether bf16 autocast is on.
        checkpointing: Whether each block uses activation checkpointing.
        sharded: Whether FSDP2 replaces DDP.
        averaged: Whether `BetaMovingAverageCallback` is on.
        accumulation: Number of micro-batches.
    """

    config: CLIPConfig
    pairs: int = 32
    candidates: int = 1000
    gpus: int = 1
    rank: int = 0
    blocks: int = 0
    seen: int = 1
    bf16: bool = True
    checkpointing: bool = False
    sharded: bool = False
    averaged: bool = False
    accumulation: int = 1

    @property
    def reached(self) -> int:
        """Blocks that gradients run through."""
        return self.blocks or self.config.vision_config.num_hidden_layers

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return (
            adapter_parameters(self.config, self.rank, self.reached) if self.rank else vision_parameters(self.config)
        )

    @property
    def images(self) -> int:
        """Number of images that the policy sees in a micro-batch."""
        return IMAGES * self.pairs


def policy_flops(step: Step) -> dict[str, int]:
    """Return the operations of the policy on one image: "forward", "backward" and "recomputed" (checkpointing).

    The backward pass of a frozen block computes only the gradients of its inputs. The first block with adapters needs
    only some of them, and the blocks below it have no backward pass.
    """
    v, dim = step.config.vision_config, step.config.projection_dim
    tokens = tokens_of(v)
    products, attention, project = _products(v, tokens), _attention(v, tokens), 2 * v.hidden_size * dim
    adapters = 8 * step.rank * v.hidden_size * tokens
    if step.rank:
        first = tokens * (6 * v.hidden_size**2 + 4 * step.rank * v.hidden_size)
        backward = step.reached * (products + 2 * attention + 2 * adapters) - first + project
    else:
        backward = 2 * (step.reached * (products + attention) + project) + _patches(v)
    return {
        "forward": image_flops(step.config) + step.reached * adapters,
        "backward": backward,
        "recomputed": step.reached * (products + attention + adapters) if step.checkpointing else 0,
    }


def step_flops(step: Step) -> int:
    """Return the operations of a micro-batch in the towers of policy and reference."""
    return step.images * sum(policy_flops(step).values()) + step.seen * step.pairs * image_flops(step.config)


def candidate_flops(step: Step) -> int:
    """Return the operations of a micro-batch's logits in float32: policy forward and backward, reference forward."""
    return 3 * step.images * 2 * step.candidates * step.config.projection_dim


def straight_flops(config: CLIPConfig, pairs: int, candidates: int, text_tokens: int) -> int:
    """Return the operations of a step without savings, on all images and texts, with both towers trained."""
    images = IMAGES * pairs * (4 * image_flops(config) - _patches(config.vision_config))
    return images + 4 * candidates * text_flops(config, text_tokens)


def concept_flops(config: CLIPConfig, pairs: int, candidates: int) -> int:
    """Return the operations of a step of a concept's transformation W, [D, D], on cached embeddings."""
    dim, images = config.projection_dim, IMAGES * pairs
    transformed = 2 * 2 * dim**2 * (images + candidates)
    penalty = 3 * 2 * dim**3
    return transformed + penalty + 4 * 2 * images * candidates * dim


# ---- Memory ------------------------------------------------------------------------------------------------


def block_bytes(tower: CLIPVisionConfig | CLIPTextConfig, tokens: int, size: int, rank: int) -> int:
    """Return the bytes that a block's forward pass keeps for its backward pass, with sdpa attention.

    A trained block keeps for each token: the two residuals, the outputs of the two norms as the linear layers read
    them (three casts for q, k and v under autocast), q, k, v, the output of the attention, and the tensors of the
    activation function. A frozen linear layer keeps no input. Means and deviations of the norms, and the log-sums of
    the attention, are float32.
    """
    half = size == HALF
    inner = (3 if tower.hidden_act == "quick_gelu" else 2) - (1 if rank else 0)
    read = ((2 if half else 1) if rank else (4 if half else 2)) * tower.hidden_size
    token = 2 * FLOAT * tower.hidden_size + size * (4 * tower.hidden_size + read + inner * tower.intermediate_size)
    return tokens * (token + size * 2 * rank + 4 * FLOAT + FLOAT * tower.num_attention_heads)


def text_activation_bytes(config: CLIPConfig, texts: int, tokens: int) -> int:
    """Return the bytes that the blocks of a trained text tower keep for `texts` texts, under bf16 autocast."""
    return config.text_config.num_hidden_layers * block_bytes(config.text_config, texts * tokens, HALF, rank=0)


def _casts(step: Step) -> int:
    """Return the bytes of bf16 copies of weights that gradients run through, kept from forward to backward."""
    if not step.bf16 or step.sharded:
        return 0
    v = step.config.vision_config
    block = block_weights(v) + 4 * step.rank * v.hidden_size
    outer = v.hidden_size * (step.config.projection_dim + (0 if step.rank else 3 * v.patch_size**2))
    if step.checkpointing:  # the copies of a block are recreated for its second forward pass
        return HALF * (block + outer)
    # The first block with adapters needs no copies that only serve the gradient of its input.
    first = (3 * v.hidden_size + 2 * step.rank) * v.hidden_size if step.rank else 0
    return HALF * (step.reached * block - first + outer)


def activation_bytes(step: Step) -> int:
    """Return the bytes, without weights, that the vision tower keeps from forward to backward of a micro-batch."""
    v = step.config.vision_config
    residual = FLOAT * step.images * tokens_of(v) * v.hidden_size
    block = block_bytes(v, step.images * tokens_of(v), HALF if step.bf16 else FLOAT, step.rank)
    # With checkpointing: the input of each block, and what one block keeps besides. Without: all blocks, and the
    # output of the last block, of which one token is read.
    kept = (step.reached - 1) * residual + block if step.checkpointing else step.reached * block + residual
    if step.rank:
        return kept - residual  # nothing below the first adapters keeps its input
    return kept + residual + pixel_bytes(step) * (HALF if step.bf16 else FLOAT) // FLOAT


def working_bytes(step: Step) -> int:
    """Return the working bytes of one activation function's backward pass: one gradient per kept tensor."""
    v = step.config.vision_config
    inner = 3 if v.hidden_act == "quick_gelu" else 2
    return (HALF if step.bf16 else FLOAT) * step.images * tokens_of(v) * inner * v.intermediate_size


def pixel_bytes(step: Step) -> int:
    """Return the bytes of a micro-batch's pixels, float32."""
    return FLOAT * step.images * 3 * step.config.vision_config.image_size**2


def candidate_bytes(step: Step) -> int:
    """Return the bytes of the candidates: embeddings (single and stacked), log-probabilities and their KL."""
    embeddings = 2 * FLOAT * step.candidates * step.config.projection_dim
    # Per pair and candidate: four log-probabilities, the reference's probability, and two working values.
    return embeddings + step.pairs * step.candidates * 7 * FLOAT


def memory(step: Step) -> dict[str, int]:
    """Return the bytes of one GPU by part. `peak` adds them up.

    The policy and the reference share the frozen weights. With FSDP2 they share nothing: the policy's weights are
    sharded, with two blocks gathered at a time, and the reference, which does not train, stays whole.
    """
    vision, text = vision_parameters(step.config), text_parameters(step.config) + 1
    share = step.gpus if step.sharded else 1
    gathered = 2 * (HALF if step.bf16 else FLOAT) * _block_parameters(step.config.vision_config)
    adapters = step.trained if step.rank else 0
    reference = vision + text if step.sharded else 0 if step.rank else vision
    return {
        "weights": FLOAT * (vision + text + adapters) // share + (gathered if step.sharded else 0),
        "optimizer": 2 * FLOAT * step.trained // share,
        "average": FLOAT * step.trained // share if step.averaged else 0,
        "reference": FLOAT * reference,
        "buckets": FLOAT * step.trained if step.gpus > 1 and not step.sharded else 0,
        "gradients": FLOAT * step.trained // share,
        "bf16 weights": _casts(step),
        "activations": activation_bytes(step) + working_bytes(step) + pixel_bytes(step),
        "candidates": candidate_bytes(step),
    }


def peak(step: Step) -> int:
    """Return the peak bytes: at the end of the forward pass, or in the optimizer's step with its working copy.

    Gradients grow while activations are freed, so with one micro-batch per step they do not add up.
    """
    parts = memory(step)
    passing = parts.pop("bf16 weights") + parts.pop("activations")
    gradients = parts.pop("gradients")
    if step.accumulation > 1:
        return sum(parts.values()) + gradients + max(passing, gradients)
    return sum(parts.values()) + max(passing, 2 * gradients)


# ---- Several GPUs ------------------------------------------------------------------------------------------


def exchanged(step: Step) -> int:
    """Return the bytes that each GPU sends in a step of one micro-batch.

    DDP: one all-reduce of the gradients in float32, 2 (n - 1) / n of them. FSDP2: the weights of the vision tower are
    gathered for the forward and for the backward pass, the frozen text tower for the forward pass, and the gradients
    are reduce-scattered once, (n - 1) / n of each. They are bf16 under autocast, and float32 otherwise.
    """
    return _passed(step) * (step.gpus - 1) // step.gpus


def _passed(step: Step) -> int:
    if not step.sharded:
        return 2 * FLOAT * step.trained
    vision, text = vision_parameters(step.config), text_parameters(step.config)
    return (HALF if step.bf16 else FLOAT) * (2 * vision + text + step.trained)


@dataclass(frozen=True)
class Machine:
    """The assumed hardware.

    Attributes:
        flops: Published operations per second of one GPU in bf16.
        flops_float: The same in float32.
        utilisation: Share of `flops` that the towers reach.
        memory_bandwidth: Bytes per second of the GPU's memory.
        node: GPUs per node.
        within: Bytes per second and direction that a GPU sends within its node.
        between: Bytes per second and direction that a node sends to others, for all its GPUs.
        links: Share of `memory_bandwidth`, `within` and `between` that is reached in practice.
        cores: CPU cores per GPU.
        rows: Pairs per second that one core reads, attacks and processes (measured by input_pipeline.py).
        file: Bytes of an image file.
    """

    flops: float = 989e12
    flops_float: float = 67e12
    utilisation: float = 0.4
    memory_bandwidth: float = 3.35e12
    node: int = 8
    within: float = 450e9
    between: float = 50e9
    links: float = 0.8
    cores: float = 14
    rows: float = 200
    file: float = 100e3


def seconds(step: Step, machine: Machine) -> dict[str, float]:
    """Return the seconds of a step of one micro-batch by part. "step" is their sum if data arrive in time.

    "exchange" overlaps with the backward pass (FSDP2: with both passes). Only the rest counts in "waiting". "data" is
    the time of the CPU cores for the same rows, and overlaps with everything.
    """
    rate = machine.flops * machine.utilisation
    towers = step_flops(step) / rate
    logits = candidate_flops(step) / (machine.flops_float * machine.utilisation)
    touched = FLOAT * (7 + 3 * step.averaged) * step.trained / (step.gpus if step.sharded else 1)
    exchange = exchange_seconds(step, machine)
    flops = policy_flops(step)
    beside = towers if step.sharded else step.images * (flops["backward"] + flops["recomputed"]) / rate
    parts = {
        "towers": towers,
        "candidates": logits,
        "update": touched / (machine.memory_bandwidth * machine.links),
        "waiting": max(0.0, exchange - beside),
    }
    data = step.pairs / (machine.cores * machine.rows)
    return {**parts, "step": sum(parts.values()), "exchange": exchange, "data": data}


def exchange_seconds(step: Step, machine: Machine) -> float:
    """Return the seconds of the exchange alone: within each node, then between nodes, once per node."""
    within = min(step.gpus, machine.node)
    nodes = -(-step.gpus // machine.node)
    inside = (within - 1) / within / machine.within
    outside = (nodes - 1) / nodes / machine.between
    return _passed(step) * (inside + outside) / machine.links
