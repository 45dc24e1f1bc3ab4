/* minimal - the shortest useful program: continues a text
 * usage: minimal MODEL.tfm "Once upon a time" */
#define TFM_IMPLEMENTATION
#include "../tfm.h"

static int print(void *user, const char *text, size_t size) {
    return fwrite(text, 1, size, (FILE *)user) != size || fflush((FILE *)user);
}

int main(int argc, char **argv) {
    tfm_error error = {0};
    tfm_model *model = argc == 3 ? tfm_load(argv[1], NULL, &error) : NULL;
    tfm_session *session = model ? tfm_session_create(model, NULL, &error) : NULL;
    tfm_generate_options options = {0};
    options.max_tokens = 100;
    if (argc != 3)
        return fputs("usage: minimal MODEL.tfm PROMPT\n", stderr), 2;
    if (!session || tfm_generate(session, argv[2], &options, print, stdout, &error) != TFM_OK)
        fprintf(stderr, "minimal: %s\n", error.message);
    tfm_session_free(session);
    tfm_free(model);
    return error.status != TFM_OK || ferror(stdout);
}
