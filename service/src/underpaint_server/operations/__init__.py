"""Work that outlives its call: learning directions, taken by one server of a store at a time."""
