"""Export a network with its model card: for timm, as graphs, in int8, to a hub; compare scorecards."""
