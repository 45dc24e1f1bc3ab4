/* A program whose library has no files: the model comes from memory. Prints the ids that follow a prompt, greedily.
 * usage: no_stdio MODEL PROMPT TOKENS.  Compile with -DTFM_NO_STDIO. */
#define TFM_IMPLEMENTATION
#include "../tfm.h"

#include <stdio.h>

static int print_id(void *user, int32_t id) {
    int *printed = (int *)user;
    return printf((*printed)++ ? " %ld" : "%ld", (long)id) < 0;
}

/* The whole of a file in memory; NULL if that can't be had. */
static void *read_all(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    void *data = NULL;
    long end;
    if (!file)
        return NULL;
    if (!fseek(file, 0, SEEK_END) && (end = ftell(file)) > 0 && !fseek(file, 0, SEEK_SET)) {
        *size = (size_t)end;
        data = malloc(*size);
        if (data && fread(data, 1, *size, file) != *size) {
            free(data);
            data = NULL;
        }
    }
    fclose(file);
    return data;
}

int main(int argc, char **argv) {
    tfm_error error = {TFM_OK, ""};
    size_t size = 0;
    void *data = argc == 4 ? read_all(argv[1], &size) : NULL;
    tfm_model *model = data ? tfm_load_memory(data, size, NULL, &error) : NULL;
    tfm_session *session = model ? tfm_session_create(model, NULL, &error) : NULL;
    tfm_generate_options options;
    int printed = 0;
    memset(&options, 0, sizeof options);
    options.on_token = print_id;
    options.on_token_user = &printed;
    if (session) {
        options.max_tokens = (size_t)strtoul(argv[3], NULL, 10);
        (void)tfm_generate(session, argv[2], &options, NULL, NULL, &error);
    }
    printf("\n");
    if (!session || error.status != TFM_OK)
        fprintf(stderr, "no_stdio: %s\n", error.message);
    tfm_session_free(session);
    tfm_free(model);
    free(data);
    return !session || error.status != TFM_OK;
}
