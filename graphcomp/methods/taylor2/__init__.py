"""Taylor in two stages: units go by scores of the backward pass, then what is left is quantized."""
