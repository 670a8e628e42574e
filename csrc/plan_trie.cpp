#include "plan_trie.h"

#include <algorithm>
#include <numeric>

namespace mmrm {
namespace {

struct Sequence {
  const int64_t* begin;
  int64_t length;
  int64_t index;            // in the input
  int64_t offset;           // of its first token in keys
  int64_t shared_with_next; // common prefix with its successor in lexicographic order, -1 for the last one
};

// Sequences [first, last) in lexicographic order share their first `start` tokens, which are packed already.
struct Group {
  size_t first, last;
  int64_t start;
  int64_t parent;  // node, -1 for a root
};

struct Node {
  Group group;
  int64_t end;
};

int64_t shared_length(const Sequence& a, const Sequence& b) {
  return std::mismatch(a.begin, a.begin + std::min(a.length, b.length), b.begin).first - a.begin;
}

bool lexicographic_less(const Sequence& a, const Sequence& b) {
  const int64_t shared = shared_length(a, b);
  if (shared < a.length && shared < b.length) return a.begin[shared] < b.begin[shared];
  return a.length != b.length ? a.length < b.length : a.index < b.index;
}

std::vector<Sequence> sorted_sequences(const int64_t* keys, const int64_t* cu_seqlens, int64_t num_sequences) {
  std::vector<Sequence> sequences(num_sequences);
  for (int64_t n = 0; n < num_sequences; ++n) {
    sequences[n] = {keys + cu_seqlens[n], cu_seqlens[n + 1] - cu_seqlens[n], n, cu_seqlens[n], -1};
  }
  std::sort(sequences.begin(), sequences.end(), lexicographic_less);
  for (size_t i = 0; i + 1 < sequences.size(); ++i) {
    sequences[i].shared_with_next = shared_length(sequences[i], sequences[i + 1]);
  }
  return sequences;
}

class TrieBuilder {
 public:
  TrieBuilder(const int64_t* keys, const int64_t* cu_seqlens, int64_t num_sequences, int64_t min_shared)
      : sequences_(sorted_sequences(keys, cu_seqlens, num_sequences)), min_shared_(min_shared) {}

  TriePlan plan() {
    build_nodes();
    return pack();
  }

 private:
  // Depth first with an explicit stack: a trie can be as deep as there are sequences.
  void build_nodes() {
    if (!sequences_.empty()) pending_.push_back({0, sequences_.size(), 0, -1});
    while (!pending_.empty()) {
      Group group = pending_.back();
      pending_.pop_back();
      const int64_t fork = fork_position(group);
      const bool is_leaf = fork < 0;
      const int64_t end = is_leaf ? sequences_[group.last - 1].length : fork;
      if (is_leaf || end - group.start >= min_shared_) {
        nodes_.push_back({group, end});
        group.start = end;
        group.parent = static_cast<int64_t>(nodes_.size()) - 1;
        // Passengers that end here come before every longer sequence of the group.
        while (group.first < group.last && sequences_[group.first].length <= end) ++group.first;
      }
      if (!is_leaf) push_children(group, fork);
    }
  }

  bool is_passenger(size_t i) const { return sequences_[i].shared_with_next == sequences_[i].length; }

  // Where the group's sequences first differ; -1 if all of them are prefixes of the last one.
  int64_t fork_position(const Group& group) const {
    int64_t fork = -1;
    for (size_t i = group.first; i + 1 < group.last; ++i) {
      const int64_t shared = sequences_[i].shared_with_next;
      if (!is_passenger(i) && (fork < 0 || shared < fork)) fork = shared;
    }
    return fork;
  }

  int64_t smallest_index(const Group& group) const {
    int64_t smallest = sequences_[group.first].index;
    for (size_t i = group.first + 1; i < group.last; ++i) smallest = std::min(smallest, sequences_[i].index);
    return smallest;
  }

  void push_children(const Group& group, int64_t fork) {
    std::vector<std::pair<int64_t, Group>> children;
    size_t first = group.first;
    for (size_t i = group.first; i < group.last; ++i) {
      if (i + 1 < group.last && (is_passenger(i) || sequences_[i].shared_with_next != fork)) continue;
      const Group child{first, i + 1, group.start, group.parent};
      children.emplace_back(smallest_index(child), child);
      first = i + 1;
    }
    // The stack pops the last one first.
    std::sort(children.begin(), children.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    for (const auto& child : children) pending_.push_back(child.second);
  }

  TriePlan pack() const {
    TriePlan plan;
    plan.last_index.resize(sequences_.size());
    count(plan);
    plan.token_index.resize(plan.cu_seqlens_q.back());
    plan.position_ids.resize(plan.cu_seqlens_q.back());
    plan.kv_index.resize(plan.cu_seqlens_k.back());
    for (size_t m = 0; m < nodes_.size(); ++m) {
      fill_tokens(nodes_[m], plan.cu_seqlens_q[m], plan);
      fill_keys(m, plan);
    }
    return plan;
  }

  void count(TriePlan& plan) const {
    plan.cu_seqlens_q.assign(1, 0);
    plan.cu_seqlens_k.assign(1, 0);
    for (const Node& node : nodes_) {
      const int64_t parent = node.group.parent;
      const int64_t num_queries = node.end - node.group.start;
      const int64_t num_inherited = parent < 0 ? 0 : plan.cu_seqlens_k[parent + 1] - plan.cu_seqlens_k[parent];
      plan.cu_seqlens_q.push_back(static_cast<int32_t>(plan.cu_seqlens_q.back() + num_queries));
      plan.cu_seqlens_k.push_back(static_cast<int32_t>(plan.cu_seqlens_k.back() + num_inherited + num_queries));
    }
  }

  // Walking from the longest sequence to the shortest: each token belongs to the smallest index that reaches it.
  void fill_tokens(const Node& node, int64_t packed, TriePlan& plan) const {
    const int64_t start = node.group.start;
    const Sequence* carrier = nullptr;
    int64_t unfilled_end = node.end;
    for (size_t i = node.group.last; i-- > node.group.first;) {
      const Sequence& sequence = sequences_[i];
      const int64_t reached = std::min(sequence.length, node.end);
      if (carrier != nullptr) copy_tokens(*carrier, reached, unfilled_end, packed - start, plan);
      unfilled_end = reached;
      if (carrier == nullptr || sequence.index < carrier->index) carrier = &sequence;
      if (sequence.length <= node.end) plan.last_index[sequence.index] = packed + sequence.length - 1 - start;
    }
    copy_tokens(*carrier, start, unfilled_end, packed - start, plan);
  }

  // Positions [first, last) of the sequence; position p is packed at p + shift.
  static void copy_tokens(const Sequence& sequence, int64_t first, int64_t last, int64_t shift, TriePlan& plan) {
    for (int64_t position = first; position < last; ++position) {
      plan.token_index[position + shift] = sequence.offset + position;
      plan.position_ids[position + shift] = position;
    }
  }

  void fill_keys(size_t m, TriePlan& plan) const {
    const int64_t parent = nodes_[m].group.parent;
    int64_t* keys = plan.kv_index.data() + plan.cu_seqlens_k[m];
    if (parent >= 0) {
      const int64_t* inherited = plan.kv_index.data();
      keys = std::copy(inherited + plan.cu_seqlens_k[parent], inherited + plan.cu_seqlens_k[parent + 1], keys);
    }
    std::iota(keys, plan.kv_index.data() + plan.cu_seqlens_k[m + 1], plan.cu_seqlens_q[m]);
  }

  std::vector<Sequence> sequences_;
  int64_t min_shared_;
  std::vector<Group> pending_;
  std::vector<Node> nodes_;
};

}  // namespace

TriePlan plan_trie(const int64_t* keys, const int64_t* cu_seqlens, int64_t num_sequences, int64_t min_shared) {
  return TrieBuilder(keys, cu_seqlens, num_sequences, min_shared).plan();
}

}  // namespace mmrm
