"""The stages that codecs are made of: what happens to a vector before it is quantised, and how it is quantised."""
