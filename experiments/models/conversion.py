"""Converts weights that come as GGUF or ONNX to transformers models."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

_ONNX_PREFIX = "model.0.auto_model."  # added by sentence-transformers


def from_gguf(file: Path) -> PreTrainedModel:
    """A language model, float32."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


def from_onnx(file: Path, architecture: dict[str, Any]) -> PreTrainedModel:
    """An encoder that sentence-transformers exported, float32 and without a pooler.

    Parameters keep their names, except for the weights of linear layers, which are nameless and
    transposed. Each is found as the factor of the product that the layer's bias is added to.
    """
    import onnx

    graph = onnx.load(file).graph
    constants = {
        constant.name: torch.from_numpy(onnx.numpy_helper.to_array(constant).copy())
        for constant in graph.initializer
    }
    parameters = {
        name.removeprefix(_ONNX_PREFIX): constant
        for name, constant in constants.items()
        if name.startswith(_ONNX_PREFIX)
    }
    factors = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    additions = [node.input for node in graph.node if node.op_type == "Add"]
    for bias, product in itertools.chain(*map(itertools.permutations, additions)):
        if bias.startswith(_ONNX_PREFIX) and product in factors:
            weight = bias.removeprefix(_ONNX_PREFIX).removesuffix("bias") + "weight"
            parameters[weight] = constants[factors[product]].T.contiguous()
    config = transformers.AutoConfig.for_model(**architecture)
    model = AutoModel.from_config(config, dtype=torch.float32, add_pooling_layer=False)
    model.load_state_dict(parameters)  # raises if one is missing or has another shape
    return model
