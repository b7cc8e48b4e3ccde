"""Reading and writing what several messages share: fields, names, images. Independent of edit methods and of gRPC."""
