"""Files as they are: each kind read in blocks, in order, from any place on; packed or not, text or token ids."""
