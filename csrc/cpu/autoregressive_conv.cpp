// Autoregressive convolution on the CPU, and its inverse: one row of pixels after another, each pixel a product of the
// weights with the channels of the pixels it looks at.
//
// A register holds one channel of as many samples, or, for samples too few to fill it, channels of one sample. Rows are
// packed to [column][channel][lane] in the order they are made (mirrored if reverse), and only those that later rows
// look at are kept. Which way a sample goes depends on the batch alone, so results do not depend on threads.

#include "../include/autoregressive_conv.h"

#include "autoregressive_conv_rows.h"
#include "processor.h"

namespace nf {
namespace NF_ISA {
namespace {

template <typename T>
struct ConvJob {
  const AutoregressiveConv& k;
  ConvWeights<T> by_samples, by_channels;
  int64_t groups;   // of kLanes samples, the last one perhaps less
  int64_t singles;  // samples after those
  LoadRun<T> load;
  StoreRun<T> store;

  explicit ConvJob(const AutoregressiveConv& conv)
      : k(conv),
        by_samples(conv, conv.batch > singles_of(conv) ? Lanes::samples : Lanes::unused),
        by_channels(conv, singles_of(conv) ? Lanes::channels : Lanes::unused),
        groups((conv.batch - singles_of(conv) + kLanes<T> - 1) / kLanes<T>),
        singles(singles_of(conv)),
        load(load_run_for<T>(conv.data)),
        store(store_run_for<T>(conv.data)) {}

  // A register of r samples costs what a full one does; r samples one by one cost r registers of channels, and twice
  // the loads.
  static int64_t singles_of(const AutoregressiveConv& conv) {
    const int64_t rest = conv.batch % kLanes<T>;
    const int64_t registers = (conv.channels + kLanes<T> - 1) / kLanes<T>;
    return 2 * rest * registers <= conv.channels ? rest : 0;
  }

  void sample(int64_t b, ConvRows<T>& rows) const {
    rows.clear();
    const int64_t step = k.form.reverse ? -k.x.p : k.x.p, out = k.form.reverse ? -k.y.p : k.y.p;
    const int64_t size = size_of(k.data);
    T line[kLine];
    for (int64_t i = 0; i < k.height; ++i) {
      const int64_t first = k.form.reverse ? (k.height - i) * k.width - 1 : i * k.width;
      const auto each = [&](View v, int64_t c, int64_t w, int64_t by) {
        return static_cast<char*>(v.data) + (b * v.b + c * v.c + first * v.p + w * by) * size;
      };
      T* in = rows.input(i);
      for (int64_t c = 0; c < k.channels; ++c)
        for (int64_t w = 0; w < k.width; w += kLine) {
          const int n = static_cast<int>(k.width - w < kLine ? k.width - w : kLine);
          load(each(k.x, c, w, step), step, n, line);
          for (int j = 0; j < n; ++j) in[(w + j) * rows.pixel + c] = line[j];
        }
      by_channels.row(rows, i);
      const T* made = rows.output(i);
      for (int64_t c = 0; c < k.channels; ++c)
        for (int64_t w = 0; w < k.width; w += kLine) {
          const int n = static_cast<int>(k.width - w < kLine ? k.width - w : kLine);
          for (int j = 0; j < n; ++j) line[j] = made[(w + j) * rows.pixel + c];
          store(each(k.y, c, w, out), out, n, line);
        }
    }
  }

  void group(int64_t g, ConvRows<T>& rows) const {
    rows.clear();
    const int64_t b = g * kLanes<T>;
    const int count = static_cast<int>(k.batch - b < kLanes<T> ? k.batch - b : kLanes<T>);
    const Square<T> in(k.x, k.data, b, count, k.form.reverse), out(k.y, k.data, b, count, k.form.reverse);
    for (int64_t i = 0; i < k.height; ++i) {
      const int64_t row = k.form.reverse ? k.height - 1 - i : i;
      in.read(row, k.width, k.channels, load, rows.input(i));
      by_samples.row(rows, i);
      out.write(row, k.width, k.channels, store, rows.output(i));
    }
  }

  static void body(void* self, int64_t begin, int64_t end) {
    const auto& job = *static_cast<ConvJob*>(self);
    if (begin < job.groups) {
      ConvRows<T> rows(job.k, job.k.channels * kLanes<T>);
      for (int64_t g = begin; g < end && g < job.groups; ++g) job.group(g, rows);
    }
    if (end > job.groups) {
      ConvRows<T> rows(job.k, job.by_channels.padded);
      for (int64_t u = begin < job.groups ? job.groups : begin; u < end; ++u)
        job.sample(job.k.batch - job.singles + u - job.groups, rows);
    }
  }
};

template <typename T>
void forward(const AutoregressiveConv& k, const Launch& on) {
  if (k.batch * k.channels * k.height * k.width == 0) return;
  ConvJob<T> job(k);
  const int64_t work = k.channels * k.channels * k.height * k.width * tap_count(k.form);  // of a sample
  on.parallel(job.groups + job.singles, kWork / work + 1, &job, ConvJob<T>::body);
}

}  // namespace

void autoregressive_conv_forward(const AutoregressiveConv& k, const Launch& on) {
  k.data == DType::f64 ? forward<double>(k, on) : forward<float>(k, on);
}

}  // namespace NF_ISA
}  // namespace nf
