// The pieces of conv2d_baked.cu for one kernel: this file stands in for generated text.
//
// Generated text has this form: the numbers of LAYOUT, the sums, and for each number of a
// piece its loads and products. LOAD reads from shared memory, `offset` bytes from the
// thread's place; ADD adds the loaded number `number`, times the weight with these bits,
// to a sum.

#define LAYOUT_NUMBERS
#define SUMS SUM(0), SUM(1)
#define PLACE "%2"

__device__ __forceinline__ void accumulate(
    int piece, const char* place, Sums& sums) {
    switch (piece) {
        case 0:
            BEGIN
            LOAD(0)
            ADD(0, 0, 3f800000)
            ADD(0, 1, bf800000)
            END
            break;
    }
}
