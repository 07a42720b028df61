"""A whole training, from a recipe to a trained model: what is around `SlidingTrainer.step`.

`setup` makes model, data and trainer of a recipe and of what the output folder holds; `loop` trains, saves, evaluates
and stops when it is told to (`stopping`); whoever watches is a `Callback` (`callbacks`): the log (`log`), TensorBoard
and Weights & Biases (`reporters`), the page of `slidetune train`. `waiting` prepares batches ahead, `slow_steps`
explains steps that took too long. The plan and the prediction come from above: nothing here knows the simulator.
"""
