/* A camera for programs that are started with this library in LD_PRELOAD: /dev/video0 as the kernel's
 * Video4Linux interface has it, 160 x 120 pixels of BGR at 25 frames/s,
 * numbered as in send_stream.py.
 *
 * The device is a file in memory, so that mmap, select and close need no help.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WIDTH = 160, HEIGHT = 120, SIZE = WIDTH * HEIGHT * 3, ROOM = 61440, BUFFERS = 8, FPS = 25 };
enum { TOP = 56, SQUARE = 16, DIGITS = 8 };

static int camera = -1;
static int queued[BUFFERS], waiting;
static double begun;
static long last = -1;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static int is_camera(const char *path) { return !strcmp(path, "/dev/video0"); }

static int open_camera(void) {
    camera = memfd_create("camera", 0);
    if (ftruncate(camera, BUFFERS * ROOM)) return -1;
    return camera;
}

#define OPEN(name)                                                                \
    int name(const char *path, int flags, ...) {                                  \
        if (is_camera(path)) return open_camera();                                \
        va_list rest;                                                             \
        va_start(rest, flags);                                                    \
        int mode = va_arg(rest, int);                                             \
        va_end(rest);                                                             \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);            \
        return real(path, flags, mode);                                           \
    }

OPEN(open)
OPEN(open64)

static int answer(unsigned long request, void *data) {
    struct v4l2_format *format = data;
    struct v4l2_buffer *buffer = data;
    switch (request) {
    case VIDIOC_QUERYCAP: {
        struct v4l2_capability *can = data;
        memset(can, 0, sizeof *can);
        strcpy((char *)can->card, "fake camera");
        can->capabilities = can->device_caps = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        return 0;
    }
    case VIDIOC_S_FMT:
        if (format->fmt.pix.pixelformat != V4L2_PIX_FMT_BGR24) break;
        /* fall through */
    case VIDIOC_G_FMT:
        format->fmt.pix.width = WIDTH;
        format->fmt.pix.height = HEIGHT;
        format->fmt.pix.pixelformat = V4L2_PIX_FMT_BGR24;
        format->fmt.pix.field = V4L2_FIELD_NONE;
        format->fmt.pix.bytesperline = 3 * WIDTH;
        format->fmt.pix.sizeimage = SIZE;
        return 0;
    case VIDIOC_G_PARM:
    case VIDIOC_S_PARM: {
        struct v4l2_captureparm *capture = &((struct v4l2_streamparm *)data)->parm.capture;
        capture->capability = V4L2_CAP_TIMEPERFRAME;
        capture->timeperframe.numerator = 1;
        capture->timeperframe.denominator = FPS;
        return 0;
    }
    case VIDIOC_REQBUFS: {
        struct v4l2_requestbuffers *wanted = data;
        if (wanted->count > BUFFERS) wanted->count = BUFFERS;
        return 0;
    }
    case VIDIOC_QUERYBUF:
        buffer->length = ROOM;
        buffer->m.offset = buffer->index * ROOM;
        return 0;
    case VIDIOC_QBUF:
        queued[waiting++] = buffer->index;
        return 0;
    case VIDIOC_DQBUF: {
        if (!waiting) break;
        if (last < 0) begun = now();
        long number = last + 1;
        double ahead = begun + (double)number / FPS - now();
        if (ahead > 0) {
            struct timespec rest = {0, (long)(1e9 * ahead)};
            nanosleep(&rest, 0);
        } else {
            number = (long)((now() - begun) * FPS);
        }
        last = number;
        unsigned char pixels[SIZE];
        memset(pixels, 128, SIZE);
        for (int row = TOP; row < TOP + SQUARE; row++)
            for (int digit = 0; digit < DIGITS; digit++)
                memset(pixels + 3 * (row * WIDTH + digit * SQUARE), number >> digit & 1 ? 235 : 20, 3 * SQUARE);
        buffer->index = queued[0];
        memmove(queued, queued + 1, --waiting * sizeof *queued);
        if (pwrite(camera, pixels, SIZE, buffer->index * ROOM) != SIZE) break;
        buffer->length = ROOM;
        buffer->bytesused = SIZE;
        buffer->flags = V4L2_BUF_FLAG_DONE;
        buffer->sequence = number;
        return 0;
    }
    case VIDIOC_STREAMON:
    case VIDIOC_STREAMOFF:
        return 0;
    }
    errno = EINVAL;
    return -1;
}

int ioctl(int file, unsigned long request, ...) {
    va_list rest;
    va_start(rest, request);
    void *data = va_arg(rest, void *);
    va_end(rest);
    if (file == camera && file >= 0) return answer(request & 0xffffffff, data);
    int (*real)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
    return real(file, request, data);
}
