"""Surroundings of a model in a Megatron program: its world, wrappers, Dynamo's settings, a machine without CUDA."""
