"""``torch.compile(model, backend="gna_flex")``: FlexAttention calls of a graph that take our routes."""
