"""A language model with bottleneck adapters inside, written by Fitout; needs torch and transformers only."""

from typing import Any

import transformers
from torch import nn


class Bottleneck(nn.Module):
    """scale * up(activation(down(x))), added to what a block gives: of its input if parallel, else of its output."""

    def __init__(self, hidden, width, settings):
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.activation = getattr(nn.functional, settings["activation"])
        self.parallel, self.scale = settings["parallel"], settings["scale"]

    def forward(self, x):
        return self.up(self.activation(self.down(x))) * self.scale


def adapted(block, args, kwargs, output):
    """Forward hook of a block: its output (the first of a tuple) with what its adapter adds."""
    first = output[0] if isinstance(output, tuple) else output
    seen = (args[0] if args else kwargs["hidden_states"]) if block.adapter.parallel else first
    first = first + block.adapter(seen)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def classes(config_name: str, model_name: str) -> tuple[Any, Any]:
    """Those of transformers ("LlamaConfig", "LlamaForCausalLM") with adapters in the blocks that the config names."""
    base_config: Any = getattr(transformers, config_name)
    base_model: Any = getattr(transformers, model_name)

    class BottleneckConfig(base_config):
        """The base's configuration under a name of its own, so that it is never loaded without its adapters."""

        model_type = "fitout_bottleneck"

    class BottleneckForCausalLM(base_model):
        config_class = BottleneckConfig

        def __init__(self, config):
            super().__init__(config)
            for name, (hidden, width) in config.bottleneck["blocks"].items():
                block = self.get_submodule(name)
                block.adapter = Bottleneck(hidden, width, config.bottleneck)
                block.register_forward_hook(adapted, with_kwargs=True)
            self.post_init()

    return BottleneckConfig, BottleneckForCausalLM
