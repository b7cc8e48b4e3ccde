"""DiffEdit: compute a mask from two prompts, edit inside it (Couairon, Verbeek, Schwenk, Cord; ICLR 2023)."""
