"""Expert parallelism: the experts of a layer are distributed over ranks."""
