"""What moves the weights, and how far: optimizers by name, the learning rate as a function of the step.

There is no scheduler object: lr = f(step). An optimizer's own step counter equals the run's step, so the only tensors
to save are what it keeps for each trained parameter, which the engine shows by name (`Engine.state`).
"""

from sft_dist.optim.build import build_optimizer, set_lr, set_step
from sft_dist.optim.schedule import SCHEDULES, lr_at

__all__ = ["SCHEDULES", "build_optimizer", "lr_at", "set_lr", "set_step"]
