"""A batch completed before it is sharded: positions, labels, masks, documents."""
