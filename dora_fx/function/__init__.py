"""The DoRA function: where its tensors lie, their collectives, norms, scales and dropout, and the formula."""
