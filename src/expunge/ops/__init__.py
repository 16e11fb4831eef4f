"""Named pieces of mathematics that methods are put together from."""
