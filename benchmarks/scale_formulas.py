"""Parameters, operations, memory, exchange and seconds of one step of the trainer, from sizes: what scale.py prints.

Sizes are those of a `CLIPConfig`: d width, m width between fc1 and fc2, T tokens, L blocks, D embedding, p patch side.
A step is that of `ContrastivePOTrainer`: the vision tower forward and backward on two images a pair (the one with a
word and the ordinary one), the reference forward on those that are not in its cache, the candidates' embeddings known.
All numbers are of one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

FLOAT, HALF = 4, 2
IMAGES = 2
"""Images a pair that the policy sees: the one with a word, and the ordinary one."""


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
"""The published sizes: OpenAI's B and L, LAION's H, g and bigG, as CLIPModel holds them."""


# ---- Parameters --------------------------------------------------------------------------------------------


def tokens_of(vision: CLIPVisionConfig) -> int:
    """T: the patches of an image, and the class token."""
    return (vision.image_size // vision.patch_size) ** 2 + 1


def block_weights(tower: CLIPVisionConfig | CLIPTextConfig) -> int:
    """Entries of a block's matrices: 4 d^2 + 2 d m."""
    return 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size


def _block_parameters(tower: CLIPVisionConfig | CLIPTextConfig) -> int:
    biases_and_norms = 9 * tower.hidden_size + tower.intermediate_size
    return block_weights(tower) + biases_and_norms


def vision_parameters(config: CLIPConfig) -> int:
    """Parameters of the vision tower and its projection."""
    v = config.vision_config
    patches = 3 * v.patch_size**2 * v.hidden_size
    embeddings = patches + (tokens_of(v) + 1) * v.hidden_size
    norms = 4 * v.hidden_size
    return embeddings + norms + v.num_hidden_layers * _block_parameters(v) + v.hidden_size * config.projection_dim


def text_parameters(config: CLIPConfig) -> int:
    """Parameters of the text tower and its projection."""
    t = config.text_config
    embeddings = (t.vocab_size + t.max_position_embeddings) * t.hidden_size
    norms = 2 * t.hidden_size
    return embeddings + norms + t.num_hidden_layers * _block_parameters(t) + t.hidden_size * config.projection_dim


def adapter_parameters(config: CLIPConfig, rank: int, blocks: int) -> int:
    """Parameters of LoRA on q_proj and v_proj of that many blocks of the vision tower."""
    return blocks * 2 * 2 * rank * config.vision_config.hidden_size


# ---- Operations --------------------------------------------------------------------------------------------


def _products(tower: CLIPVisionConfig | CLIPTextConfig, tokens: int) -> int:
    """Operations of a block's products with its matrices, forward; a multiplication and an addition are two."""
    return 2 * tokens * block_weights(tower)


def _attention(tower: CLIPVisionConfig | CLIPTextConfig, tokens: int) -> int:
    """Operations of a block's products of queries, keys and values, forward."""
    return 4 * tokens**2 * tower.hidden_size


def _patches(vision: CLIPVisionConfig) -> int:
    return 2 * 3 * vision.patch_size**2 * vision.hidden_size * (tokens_of(vision) - 1)


def image_flops(config: CLIPConfig) -> int:
    """Operations to embed one image, forward."""
    v = config.vision_config
    block = _products(v, tokens_of(v)) + _attention(v, tokens_of(v))
    return _patches(v) + v.num_hidden_layers * block + 2 * v.hidden_size * config.projection_dim


def text_flops(config: CLIPConfig, tokens: int) -> int:
    """Operations to embed one text of that many tokens, forward."""
    t = config.text_config
    block = _products(t, tokens) + _attention(t, tokens)
    return t.num_hidden_layers * block + 2 * t.hidden_size * config.projection_dim


@dataclass(frozen=True)
class Step:
    """One optimizer step of one GPU.

    Attributes:
        config: The model.
        pairs: Rows a GPU and micro-batch.
        candidates: Texts among which the policy chooses, given once for all rows.
        gpus: Processes.
        rank: Of the adapters on q_proj and v_proj; 0 trains the whole vision tower.
        blocks: How many blocks have adapters, from the last one down; 0 for all.
        seen: Images of a pair that the reference sees in each step: 0 where all are fixed and cached, 1 where the
            attack is drawn anew, 2 where nothing is cached (a stream).
        bf16: Autocast.
        checkpointing: Activation checkpointing of each block.
        sharded: FSDP2 instead of DDP.
        averaged: `BetaMovingAverageCallback`.
        accumulation: Micro-batches.
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
        """Parameters that train."""
        return (
            adapter_parameters(self.config, self.rank, self.reached) if self.rank else vision_parameters(self.config)
        )

    @property
    def images(self) -> int:
        """Images of the policy a micro-batch."""
        return IMAGES * self.pairs


def policy_flops(step: Step) -> dict[str, int]:
    """Operations of the policy on one image: "forward", "backward" and "recomputed" (checkpointing).

    A frozen block's backward pass has the gradients of its inputs alone; the first that has adapters not even all of
    these, and the blocks below it no backward pass.
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
    """Operations of a micro-batch in the towers: the policy on its images, the reference on those that it sees."""
    return step.images * sum(policy_flops(step).values()) + step.seen * step.pairs * image_flops(step.config)


def candidate_flops(step: Step) -> int:
    """Operations of a micro-batch's logits, in float32: policy forward and backward, reference forward."""
    return 3 * step.images * 2 * step.candidates * step.config.projection_dim


def straight_flops(config: CLIPConfig, pairs: int, candidates: int, text_tokens: int) -> int:
    """Operations of a step without savings: policy and reference see all images and texts, both towers train."""
    images = IMAGES * pairs * (4 * image_flops(config) - _patches(config.vision_config))
    return images + 4 * candidates * text_flops(config, text_tokens)


def concept_flops(config: CLIPConfig, pairs: int, candidates: int) -> int:
    """Operations of a step of a concept's transformation W, [D, D], on cached embeddings."""
    dim, images = config.projection_dim, IMAGES * pairs
    transformed = 2 * 2 * dim**2 * (images + candidates)
    penalty = 3 * 2 * dim**3
    return transformed + penalty + 4 * 2 * images * candidates * dim


# ---- Memory ------------------------------------------------------------------------------------------------


def block_bytes(tower: CLIPVisionConfig | CLIPTextConfig, tokens: int, size: int, rank: int) -> int:
    """Bytes that a block's forward pass keeps for its backward pass, with sdpa attention.

    Of a block that trains, a token: the two residuals, the two norms' outputs as the linear layers read them (under
    autocast in three casts for q, k and v), q, k, v and the attention's output, and what the activation function
    keeps. A frozen linear layer keeps no input. Means and deviations of the norms, and the attention's log-sums, are
    float32.
    """
    half = size == HALF
    inner = (3 if tower.hidden_act == "quick_gelu" else 2) - (1 if rank else 0)
    read = ((2 if half else 1) if rank else (4 if half else 2)) * tower.hidden_size
    token = 2 * FLOAT * tower.hidden_size + size * (4 * tower.hidden_size + read + inner * tower.intermediate_size)
    return tokens * (token + size * 2 * rank + 4 * FLOAT + FLOAT * tower.num_attention_heads)


def text_activation_bytes(config: CLIPConfig, texts: int, tokens: int) -> int:
    """Bytes that the blocks of a text tower that trains keep of so many texts, under bf16 autocast."""
    return config.text_config.num_hidden_layers * block_bytes(config.text_config, texts * tokens, HALF, rank=0)


def _casts(step: Step) -> int:
    """bf16 copies of the weights that gradients run through, alive from the forward to the backward pass."""
    if not step.bf16 or step.sharded:
        return 0
    v = step.config.vision_config
    block = block_weights(v) + 4 * step.rank * v.hidden_size
    outer = v.hidden_size * (step.config.projection_dim + (0 if step.rank else 3 * v.patch_size**2))
    if step.checkpointing:  # a block's are made anew for its second forward pass
        return HALF * (block + outer)
    # Of the first block with adapters, those that only its input's gradient would need are left out.
    first = (3 * v.hidden_size + 2 * step.rank) * v.hidden_size if step.rank else 0
    return HALF * (step.reached * block - first + outer)


def activation_bytes(step: Step) -> int:
    """Bytes that the vision tower keeps from the forward to the backward pass of a micro-batch, weights apart."""
    v = step.config.vision_config
    residual = FLOAT * step.images * tokens_of(v) * v.hidden_size
    block = block_bytes(v, step.images * tokens_of(v), HALF if step.bf16 else FLOAT, step.rank)
    # With checkpointing each block's input, and what one block keeps besides it; else the last block's output too, of
    # which one token is read.
    kept = (step.reached - 1) * residual + block if step.checkpointing else step.reached * block + residual
    if step.rank:
        return kept - residual  # nothing below the first adapters keeps its input
    return kept + residual + pixel_bytes(step) * (HALF if step.bf16 else FLOAT) // FLOAT


def working_bytes(step: Step) -> int:
    """Bytes at work in the backward pass of one activation function: as many gradients as it keeps tensors."""
    v = step.config.vision_config
    inner = 3 if v.hidden_act == "quick_gelu" else 2
    return (HALF if step.bf16 else FLOAT) * step.images * tokens_of(v) * inner * v.intermediate_size


def pixel_bytes(step: Step) -> int:
    """Bytes of a micro-batch's pixels, float32."""
    return FLOAT * step.images * 3 * step.config.vision_config.image_size**2


def candidate_bytes(step: Step) -> int:
    """Bytes of the candidates: embeddings (each and stacked), log-probabilities of policy and reference, their KL."""
    embeddings = 2 * FLOAT * step.candidates * step.config.projection_dim
    # Four log-probabilities a pair and candidate, the reference's probability, and two at work.
    return embeddings + step.pairs * step.candidates * 7 * FLOAT


def memory(step: Step) -> dict[str, int]:
    """Bytes of one GPU, by part; they are summed by `peak`.

    The policy and the reference share what does not train. With FSDP2 they share nothing: the policy's weights are a
    share, of which two blocks at a time are gathered, and the reference, which is no part of what trains, stays whole.
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
    """Bytes at the fullest moment: as the forward pass ends, or as the optimizer steps with a copy at work.

    Gradients grow as activations go, so with one micro-batch a step the two are not there at once.
    """
    parts = memory(step)
    passing = parts.pop("bf16 weights") + parts.pop("activations")
    gradients = parts.pop("gradients")
    if step.accumulation > 1:
        return sum(parts.values()) + gradients + max(passing, gradients)
    return sum(parts.values()) + max(passing, 2 * gradients)


# ---- Several GPUs ------------------------------------------------------------------------------------------


def exchanged(step: Step) -> int:
    """Bytes that each GPU sends in a step of one micro-batch.

    DDP: one all-reduce of the gradients in float32, 2 (n - 1) / n of them. FSDP2: the vision tower's weights gathered
    for the forward and for the backward pass, the frozen text tower's for the forward pass, and the gradients
    reduce-scattered once, (n - 1) / n of each; in bf16 under autocast's policy, else in float32.
    """
    return _passed(step) * (step.gpus - 1) // step.gpus


def _passed(step: Step) -> int:
    if not step.sharded:
        return 2 * FLOAT * step.trained
    vision, text = vision_parameters(step.config), text_parameters(step.config)
    return (HALF if step.bf16 else FLOAT) * (2 * vision + text + step.trained)


@dataclass(frozen=True)
class Machine:
    """What the seconds rest on.

    Attributes:
        flops: Operations a second of one GPU in bf16, as published.
        flops_float: The same in float32.
        utilisation: Share of `flops` that the towers reach.
        memory_bandwidth: Bytes a second of the GPU's memory.
        node: GPUs a node.
        within: Bytes a second and direction that a GPU sends within its node.
        between: Bytes a second and direction that a node sends to others, of all its GPUs.
        links: Share of `memory_bandwidth`, `within` and `between` that is reached.
        cores: CPU cores a GPU.
        rows: Pairs a second that one core reads, attacks and turns to pixels (input_pipeline.py measures it).
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
    """Seconds of a step of one micro-batch, by part; "step" is their sum where nothing waits for data.

    "exchange" runs beside the backward pass (FSDP2: beside both), and only what is left over counts in "waiting".
    "data" is what the CPU cores need for the same rows, and runs beside all of it.
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
    """Seconds of the exchange alone: within each node, then between nodes, each of which sends once for its GPUs."""
    within = min(step.gpus, machine.node)
    nodes = -(-step.gpus // machine.node)
    inside = (within - 1) / within / machine.within
    outside = (nodes - 1) / nodes / machine.between
    return _passed(step) * (inside + outside) / machine.links
