/* The translation unit that has the implementation; b.c has the declarations alone. */
#define TFM_IMPLEMENTATION
#include "tfm.h"

int other_unit(void);

int main(void) {
    const float ones[4] = {1, 1, 1, 1};
    tfm_tensor vector = tfm_vector(ones, 4);
    if (tfm_tensor_bytes(&vector) != 16 || other_unit() != 0)
        return 1;
    puts("two translation units: fine");
    return 0;
}
