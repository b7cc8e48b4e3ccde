"""Reading and writing what messages have in common: fields, names, images. Knows no method and no RPC."""
