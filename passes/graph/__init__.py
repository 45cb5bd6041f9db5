"""The fx graph: the contract of passes, tracing into graphs, layouts, costs, fake tensors."""
