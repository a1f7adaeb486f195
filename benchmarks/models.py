"""The shapes of real models' parameters, so that no weights and no model library are needed."""

from __future__ import annotations

from math import prod

Shapes = list[tuple[int, ...]]


def bert_base() -> Shapes:
    """BERT-base, uncased, with its pooler: 199 tensors, most of them small."""
    hidden, inner = 768, 3072
    norm: Shapes = [(hidden,), (hidden,)]
    attention: Shapes = [(hidden, hidden), (hidden,)] * 4
    feed_forward: Shapes = [(inner, hidden), (inner,), (hidden, inner), (hidden,)]
    embeddings: Shapes = [(30_522, hidden), (512, hidden), (2, hidden), *norm]
    return (
        embeddings + 12 * (attention + norm + feed_forward + norm) + [(hidden, hidden), (hidden,)]
    )


def smollm2_135m() -> Shapes:
    """SmolLM2-135M, a Llama with grouped-query attention and tied embeddings."""
    hidden, inner, key_value = 576, 1536, 192
    attention: Shapes = [(hidden, hidden), (key_value, hidden), (key_value, hidden)]
    attention += [(hidden, hidden)]
    feed_forward: Shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    layer = attention + feed_forward + [(hidden,), (hidden,)]
    return [(49_152, hidden), *(30 * layer), (hidden,)]


def resnet_50() -> Shapes:
    """ResNet-50 for ImageNet: convolutions, their batch norms, and the classifier."""

    def convolution(inputs: int, outputs: int, kernel: int) -> Shapes:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes = convolution(3, 64, 7)
    inputs = 64
    for width, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(num_blocks):
            shapes += convolution(inputs, width, 1)
            shapes += convolution(width, width, 3)
            shapes += convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def llama2_7b() -> Shapes:
    """Llama-2-7B: 291 tensors, 6.7 billion parameters."""
    hidden, inner, vocabulary = 4096, 11_008, 32_000
    attention: Shapes = [(hidden, hidden)] * 4
    layer = [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]
    layer += [(hidden,), (hidden,)]
    return [(vocabulary, hidden), *(32 * layer), (hidden,), (vocabulary, hidden)]


MODELS: dict[str, Shapes] = {
    "one-tensor": [(4096, 4096)],
    "bert-base": bert_base(),
    "smollm2-135m": smollm2_135m(),
    "resnet-50": resnet_50(),
}

# The same shapes, but most rows of the embeddings have no gradient. The numbers of rows that do:
# 32 pairs of MNLI contain some 500 different tokens at 64 positions.
SPARSE_MODELS = {"bert-base-mnli": "bert-base"}
ROWS_WITH_GRADIENT = {(30_522, 768): 500, (512, 768): 64}

# For GPUs, where a step must take much longer than a launch to be measurable.
LARGE_MODELS: dict[str, Shapes] = {"2^30": [(1 << 30,)], "llama2-7b": llama2_7b()}

# For the cost of a step apart from its arithmetic.
SMALL_MODELS: dict[str, Shapes] = {"200 x 16": [(16,)] * 200, "200 x 768": [(768,)] * 200}


def num_parameters(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes)
