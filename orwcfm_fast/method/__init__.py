"""The method, a stage a file: noise, coupling, weighting, samplers, rollout, minibatches, step, trainer."""
