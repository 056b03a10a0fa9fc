"""Where the images of an index and their features are kept; the search over them is elsewhere."""
