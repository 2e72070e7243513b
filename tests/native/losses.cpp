// linear_kl_div at every level of this machine against double precision, on rows that end where memory does.
#include <vector>

#include "checks.h"
#include "cpu/linear_kl_div/linear_kl_div.h"

namespace checks {
namespace {

using namespace llmkern;

struct LossCase {
    int64_t n, v, k;  // k 0: the teacher's logits
    Divergence kind;
    double temperature, ce_weight, softcap;  // softcap 0: none
    bool tail;
};

const LossCase LOSSES[] = {
    {1, 1, 0, Divergence::FORWARD_KL, 1, 0, 0, true},
    {3, 7, 0, Divergence::REVERSE_KL, 2, 0.5, 0, true},
    {2, 33, 0, Divergence::JSD, 1, 0.5, 4, true},
    {2, 1025, 0, Divergence::SKEW_KL, 0.7, 0, 0, true},
    {2, 2049, 0, Divergence::SKEW_REVERSE_KL, 3, 1, 5, true},
    {2, 1500, 0, Divergence::FORWARD_KL, 1, 0, 0, true},
    {3, 40, 5, Divergence::FORWARD_KL, 1, 0.5, 0, true},
    {2, 1031, 17, Divergence::FORWARD_KL, 2, 0, 6, false},
    {2, 9, 9, Divergence::FORWARD_KL, 1, 0, 0, true},
};
const double MIX = 0.3;

// A row of logits as probabilities at the temperature and at 1.
struct Softmax {
    std::vector<double> p, plain;
    int64_t best = 0;

    Softmax(const Array& logits, int64_t first, int64_t v, double softcap, double temperature) : p(v), plain(v) {
        double sum = 0, other = 0;
        for (int64_t i = 0; i < v; ++i) {
            const double raw = logits.get(first + i), z = softcap > 0 ? softcap * std::tanh(raw / softcap) : raw;
            sum += p[i] = std::exp(z / temperature);
            other += plain[i] = std::exp(z);
            if (plain[i] > plain[best]) best = i;
        }
        for (int64_t i = 0; i < v; ++i) p[i] /= sum, plain[i] /= other;
    }
};

double divergence(Divergence kind, const std::vector<double>& p, const std::vector<double>& q,
                  std::vector<double>& gradient) {
    double value = 0, shift = 0;
    std::vector<double> g(p.size());
    for (size_t i = 0; i < p.size(); ++i) {
        const double m = MIX * p[i] + (1 - MIX) * q[i], log_pm = std::log(p[i] / m), log_qm = std::log(q[i] / m);
        switch (kind) {
            case Divergence::FORWARD_KL:
                value += p[i] * std::log(p[i] / q[i]), g[i] = -p[i] / q[i];
                break;
            case Divergence::REVERSE_KL:
                value += q[i] * std::log(q[i] / p[i]), g[i] = std::log(q[i] / p[i]);
                break;
            case Divergence::JSD:
                value += MIX * p[i] * log_pm + (1 - MIX) * q[i] * log_qm, g[i] = (1 - MIX) * log_qm;
                break;
            case Divergence::SKEW_KL:
                value += p[i] * log_pm, g[i] = -(1 - MIX) * p[i] / m;
                break;
            default:
                value += q[i] * log_qm, g[i] = log_qm - (1 - MIX) * q[i] / m;
        }
        shift += q[i] * g[i];
    }
    for (size_t i = 0; i < p.size(); ++i) gradient[i] = q[i] * (g[i] - shift);
    return value;
}

double top_k(const LossCase& c, const int64_t* indices, const float* log_probs, const std::vector<double>& q,
             std::vector<double>& gradient) {
    double value = 0, mass = 0, others = 1;
    std::vector<double> p(q.size(), -1.0);
    for (int64_t j = 0; j < c.k; ++j) {
        const double probability = p[indices[j]] = std::exp(static_cast<double>(log_probs[j]));
        value += probability * (log_probs[j] - std::log(q[indices[j]]));
        mass += probability, others -= q[indices[j]];
    }
    const double rest = c.tail && c.k < c.v ? 1 - mass : 0;
    if (rest > 0) value += rest * std::log(rest / others);
    for (size_t i = 0; i < q.size(); ++i)
        gradient[i] = (mass + rest) * q[i] - (p[i] >= 0 ? p[i] : rest > 0 ? rest * q[i] / others : 0);
    return value;
}

struct Loss {
    LossCase shape;
    std::unique_ptr<Array> student, teacher, log_probs;
    Array indices, labels;  // int64

    Loss(const LossCase& c, DType dtype, Random& random)
        : shape(c),
          student(random_array(dtype, c.n * c.v, random, 2)),
          teacher(random_array(dtype, c.n * c.v, random, 2)),
          log_probs(std::make_unique<Array>(DType::F32, c.n * c.k)),
          indices(DType::F32, 2 * c.n * c.k),
          labels(DType::F32, 2 * c.n) {
        for (int64_t i = 0; i < c.n; ++i) {
            labels.data<int64_t>()[i] = i == 0 ? c.v - 1 : random.below(c.v);  // a block's last class, too
            for (int64_t j = 0; j < c.k; ++j) {
                indices.data<int64_t>()[i * c.k + j] = (j * 7 + i) % c.v;  // distinct: 7 divides no v here
                log_probs->set(i * c.k + j, std::log(0.9 / static_cast<double>(c.k)) + 0.1 * random.uniform());
            }
        }
    }
};

void run_loss(const Loss& loss, const char* level, void (*run)(const LinearKlDivArgs&)) {
    if (!runs_here(level)) return;
    const LossCase& c = loss.shape;
    const DType dtype = loss.student->dtype();
    Array logits(dtype, c.n * c.v), stats(DType::F32, 3 * c.n);
    std::memcpy(logits.data(), loss.student->data(), static_cast<size_t>(c.n * c.v * size_of(dtype)));
    stats.fill(0xff);
    const double weight = 2;
    LinearKlDivArgs args{};
    args.student = logits.data(), args.student_dtype = args.teacher_dtype = dtype;
    args.teacher = c.k ? nullptr : loss.teacher->data();
    args.indices = loss.indices.data<int64_t>(), args.log_probs = loss.log_probs->data<float>();
    args.labels = loss.labels.data<int64_t>(), args.stats = stats.data<float>();
    args.n = c.n, args.v = c.v, args.k = c.k, args.kind = c.kind, args.mix = static_cast<float>(MIX);
    args.temperature = static_cast<float>(c.temperature), args.divergence_weight = static_cast<float>(weight);
    args.ce_weight = static_cast<float>(c.ce_weight), args.softcap = static_cast<float>(c.softcap);
    args.tail = c.tail, args.gradient = true, args.threads = 2;
    run(args);
    double worst = 0, worst_stat = 0;
    std::vector<double> d(c.v);
    for (int64_t i = 0; i < c.n; ++i) {
        const Softmax q(*loss.student, i * c.v, c.v, c.softcap, c.temperature);
        const Softmax p(*loss.teacher, i * c.v, c.v, 0, c.temperature);
        const int64_t label = args.labels[i];
        const double value =
            c.k ? top_k(c, args.indices + i * c.k, args.log_probs + i * c.k, q.p, d) : divergence(c.kind, p.p, q.p, d);
        const int64_t best = c.k ? args.indices[i * c.k] : p.best;
        const double wanted[] = {value, -std::log(q.plain[label]), q.best == best ? 1.0 : 0.0};
        for (int j = 0; j < 3; ++j)
            worst_stat = std::fmax(worst_stat, std::fabs(stats.get(3 * i + j) - wanted[j]) / (1 + wanted[j]));
        for (int64_t j = 0; j < c.v; ++j) {
            double g = d[j] * weight / c.temperature + c.ce_weight * (q.plain[j] - (j == label));
            if (c.softcap > 0) {
                const double share = std::tanh(loss.student->get(i * c.v + j) / c.softcap);
                g *= 1 - share * share;
            }
            const double rounding = dtype == DType::F32 ? 0 : 0.51 * epsilon(dtype) * std::fabs(g);
            worst = std::fmax(worst, std::fabs(logits.get(i * c.v + j) - g) - rounding);
        }
    }
    check(worst <= 3e-6 && worst_stat <= 3e-6,
          "linear_kl_div on %s, %s, %ld x %ld, k %ld, kind %d: gradient off by %g, sums by %g", level, name_of(dtype),
          c.n, c.v, c.k, static_cast<int>(c.kind), worst, worst_stat);
}

}  // namespace

void check_losses() {
    Random random(3);
    for (const LossCase& shape : LOSSES)
        for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
            const Loss loss(shape, dtype, random);
#define LLMKERN_KERNEL(level) run_loss(loss, #level, level::linear_kl_div);
#include "cpu/linear_kl_div/kernels.def"
#undef LLMKERN_KERNEL
        }
}

}  // namespace checks
