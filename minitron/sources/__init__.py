"""Where text comes from, before it is text: files of every kind read as they are, in order and in blocks, from any place on."""
