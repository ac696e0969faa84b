package reconcile

import (
	"cmp"
	"container/heap"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// place finds a node for each session that has none: a ready one with the labels
// and the size asked for, that has the fewest sessions; the smaller id if there
// are several.
func place(pending []*fleet.Session, nodes []*fleet.Node, count map[string]int) []Action {
	if len(pending) == 0 {
		return nil
	}
	slices.SortFunc(pending, func(a, b *fleet.Session) int {
		return cmp.Or(a.CreateTime.Compare(b.CreateTime), cmp.Compare(a.ID, b.ID))
	})
	// Sessions that ask for the same share one search.
	groups := map[string]*group{}
	var actions []Action
	for _, s := range pending {
		key := demandKey(s.Spec)
		g, ok := groups[key]
		if !ok {
			g = newGroup(s.Spec, nodes, count)
			groups[key] = g
		}
		if node, ok := g.take(count); ok {
			a := action(Place, s, fleet.StateStarting, "", "")
			a.Node = node
			actions = append(actions, a)
			continue
		}
		if s.State != fleet.StatePending || s.Reason != g.reason || s.Message != g.message {
			actions = append(actions, action(SetState, s, fleet.StatePending, g.reason, g.message))
		}
	}
	return actions
}

func demandKey(s fleet.Spec) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %d %d", s.Resources.CPUMillis, s.Resources.MemoryBytes, s.Resources.DiskBytes)
	for _, k := range slices.Sorted(maps.Keys(s.NodeSelector)) {
		b.WriteString(" " + strconv.Quote(k) + strconv.Quote(s.NodeSelector[k]))
	}
	return b.String()
}

// group is a demand: the nodes that meet it, or why there are none.
type group struct {
	candidates      candidates
	reason, message string
}

type candidate struct {
	node  string
	count int // when it was last looked at; other groups place, too
}

func newGroup(spec fleet.Spec, nodes []*fleet.Node, count map[string]int) *group {
	g := &group{}
	var notReady, notMatching, tooSmall []string
	for _, n := range nodes {
		switch {
		case n.State != fleet.NodeReady:
			notReady = append(notReady, n.ID)
		case !matches(n, spec.NodeSelector):
			notMatching = append(notMatching, n.ID)
		case !fits(n, spec.Resources):
			tooSmall = append(tooSmall, n.ID)
		default:
			g.candidates = append(g.candidates, candidate{n.ID, count[n.ID]})
		}
	}
	heap.Init(&g.candidates)
	switch {
	case len(g.candidates) > 0:
	case len(tooSmall) > 0: // the nearest miss says most
		g.reason = fleet.ReasonTooLarge
		g.message = fmt.Sprintf("The session asks for %s, which is more than %s. Ask for less, or add a larger node.",
			demand(spec.Resources), names("node", tooSmall, "has", "have"))
	case len(notMatching) > 0:
		g.reason = fleet.ReasonNoMatchingNode
		g.message = fmt.Sprintf("No ready node has the labels %s that the session asks for; ready without them: %s. Change the session's node_selector, or start a node with these labels.",
			selector(spec.NodeSelector), names("node", notMatching, "", ""))
		if len(notReady) > 0 {
			g.message += fmt.Sprintf(" Not ready: %s.", names("node", notReady, "", ""))
		}
	case len(notReady) > 0:
		g.reason = fleet.ReasonNoReadyNode
		g.message = fmt.Sprintf("No node is ready: %s not been heard of in time. Check that `cloudcode nodeagent` runs there and reaches this server.",
			names("node", notReady, "has", "have"))
	default:
		g.reason = fleet.ReasonNoNodes
		g.message = "No node has joined. Start one with `cloudcode nodeagent`, or use `cloudcode up`, which brings its own."
	}
	return g
}

// take gives the next session of the group its node.
func (g *group) take(count map[string]int) (string, bool) {
	for len(g.candidates) > 0 {
		first := &g.candidates[0]
		if n := count[first.node]; n != first.count {
			first.count = n
			heap.Fix(&g.candidates, 0)
			continue
		}
		first.count++
		count[first.node]++
		node := first.node
		heap.Fix(&g.candidates, 0)
		return node, true
	}
	return "", false
}

func matches(n *fleet.Node, selector map[string]string) bool {
	for k, v := range selector {
		if got, ok := n.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// fits compares with the size of the machine, not with what is free: limits are
// upper bounds, and sessions are mostly idle. A size the node did not say is no
// obstacle.
func fits(n *fleet.Node, r fleet.Resources) bool {
	within := func(want, have int64) bool { return have == 0 || want <= have }
	return within(r.CPUMillis, n.Info.CPUMillis) && within(r.MemoryBytes, n.Info.MemoryBytes) && within(r.DiskBytes, n.Info.DiskBytes)
}

func demand(r fleet.Resources) string {
	var parts []string
	if r.CPUMillis > 0 {
		parts = append(parts, strconv.FormatFloat(float64(r.CPUMillis)/1000, 'f', -1, 64)+" CPUs")
	}
	if r.MemoryBytes > 0 {
		parts = append(parts, bytesText(r.MemoryBytes)+" of memory")
	}
	if r.DiskBytes > 0 {
		parts = append(parts, bytesText(r.DiskBytes)+" of disk")
	}
	return strings.Join(parts, ", ")
}

func bytesText(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}
	v, u := float64(n), 0
	for v >= 1024 && u < len(units)-1 {
		v, u = v/1024, u+1
	}
	return strconv.FormatFloat(v, 'f', 1, 64) + " " + units[u]
}

func selector(m map[string]string) string {
	parts := make([]string, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, k+"="+m[k])
	}
	return strings.Join(parts, ",")
}

// names says which nodes, and how many more: a message has an end.
func names(noun string, ids []string, singular, plural string) string {
	const shown = 3
	slices.Sort(ids)
	verb := plural
	if len(ids) == 1 {
		verb = singular
	} else {
		noun += "s"
	}
	text := noun + " " + strings.Join(ids[:min(shown, len(ids))], ", ")
	if more := len(ids) - shown; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return strings.TrimSpace(text + " " + verb)
}

// candidates is a heap: fewest sessions first, then by id.
type candidates []candidate

func (c candidates) Len() int { return len(c) }
func (c candidates) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(c[i].count, c[j].count), cmp.Compare(c[i].node, c[j].node)) < 0
}
func (c candidates) Swap(i, j int) { c[i], c[j] = c[j], c[i] }
func (c *candidates) Push(x any)   { *c = append(*c, x.(candidate)) }
func (c *candidates) Pop() any {
	old := *c
	last := old[len(old)-1]
	*c = old[:len(old)-1]
	return last
}
