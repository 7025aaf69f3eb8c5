"""A device that takes so many tokens at once and no more."""

import torch
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune_nb.losses import inner_model


def limited(model, most, well=0):
    "From now on a forward pass over more tokens than `most` raises what a GPU raises, after `well` of them; `sizes` are those that were computed."
    table = inner_model(model).get_input_embeddings()
    table.most, table.sizes = most, []

    def look(module, args):
        tokens = args[0].shape[0] * args[0].shape[1]
        if tokens > table.most and len(table.sizes) >= well:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if tokens > 9:  # some architectures try themselves on a few
            table.sizes.append(tokens)

    blocks = [module for module in inner_model(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    return table, blocks[-1].register_forward_pre_hook(look)  # when the blocks before have drawn their dropout


class From(TrainerCallback):
    "From a step on, the device takes fewer tokens."

    def __init__(self, table, step, most):
        self.table, self.step, self.most = table, step, most

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.table.most = self.most
