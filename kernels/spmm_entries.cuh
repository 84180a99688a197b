// The entries of a block's rows in a chunk of channels, as conv2d_spmm.cu reads them and
// place_entries.cu writes them: quads of entries, and behind them a span for each row.

#pragma once

#include "prelude.cuh"

// Entries of a row, as they are read at once: what they multiply by, and where they read
// the tile, in bytes from a lane's place on.
struct alignas(16) Entries {
    Accumulator weights[QUAD];
    int offsets[QUAD];
};

// A row's entries of a chunk: the first one's quad, and how many they are.
struct Span {
    int first;
    int count;
};

// What is copied at once.
struct alignas(16) Piece {
    int words[4];
};
