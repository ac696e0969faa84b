package checkpoint

// Compaction. Packs of which little is needed any more, and packs that are small
// and many, are treated as lost: what is needed of them is read from the tree and
// sent again, and garbage collection gets the rest once no checkpoint names them.
const (
	compactLive  = 0.4
	compactBytes = 8 << 20 // moved by one Save
	compactGain  = 8 << 20 // worth a start
	smallPack    = 512 << 10
	smallPacks   = 64
)

func (w *Writer) compact() {
	if w.base == nil || w.live == nil {
		return
	}
	var sparse, small []*pack
	gain := int64(0)
	for _, p := range w.base.packs {
		live := w.live[p]
		if p.plain > 0 && float64(live) < compactLive*float64(p.plain) {
			sparse = append(sparse, p)
			gain += p.plain - live
		}
		if p.plain < smallPack {
			small = append(small, p)
		}
	}
	var move []*pack
	if gain >= compactGain {
		move = sparse
	}
	if len(small) >= smallPacks {
		move = append(move, small...)
	}
	budget := int64(compactBytes)
	any := false
	for _, p := range move {
		if live := w.live[p]; !p.lost && live <= budget {
			budget -= live
			p.lost, any = true, true
		}
	}
	if any {
		w.sweep()
	}
}
