package checkpoint

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// segmenter turns the picture into segments and counts what is in it.
type segmenter struct {
	w    *Writer
	p    *packer
	enc  *encoder
	m    *Manifest
	seen map[*pack]bool
	live map[*pack]int64
	link map[[2]uint64]string // first names of files that have several
	odd  int                  // entries of ids outside the container's
	size treeSize
	text int64 // of segments
	note notes
}

// notes are bounded: a tree can be full of sockets.
type notes struct {
	all  []string
	more int
}

func (n *notes) add(s string) {
	if len(n.all) >= maxNotes {
		n.more++
		return
	}
	n.all = append(n.all, clipNote(s))
}

func clipNote(s string) string {
	if len(s) > maxNote {
		s = s[:maxNote/2] + "…" + s[len(s)-maxNote/2:]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

func (n *notes) list() []string {
	if n.more > 0 {
		return append(n.all, fmt.Sprintf("and %d more", n.more))
	}
	return n.all
}

// encode writes lists and segments of the picture, and fills in a manifest but for
// who made it and when.
func (w *Writer) encode(p *packer, s *scan) (*Manifest, error) {
	// Where chunks are must be known before lists name them, and where lists are
	// before segments do.
	if err := p.flush(); err != nil {
		return nil, err
	}
	if err := w.lists(p); err != nil {
		return nil, err
	}
	g := &segmenter{
		w: w, p: p, enc: newEncoder(), m: &Manifest{cat: newCatalog()},
		seen: map[*pack]bool{}, live: map[*pack]int64{}, link: map[[2]uint64]string{},
	}
	for _, n := range s.notes {
		g.note.add(n)
	}
	if err := g.dir("", w.tree); err != nil {
		return nil, err
	}
	if err := g.cut(); err != nil {
		return nil, err
	}
	if err := p.flush(); err != nil {
		return nil, err
	}
	for _, c := range g.m.segments {
		g.uses(c)
	}
	if g.odd > 0 {
		g.note.add(fmt.Sprintf("%d files belong to ids outside the session's range: they are saved as nobody's", g.odd))
	}
	g.m.Notes = g.note.list()
	w.live = g.live
	return g.m, nil
}

// lists makes lists for files of many extents.
func (w *Writer) lists(p *packer) (err error) {
	added := false
	w.tree.each(func(n *node) {
		c := n.content
		if c == nil || len(c.ext) <= listAt || c.lists != nil || err != nil {
			return
		}
		enc := newEncoder()
		cut := func() {
			if err != nil || enc.count == 0 {
				return
			}
			text := enc.bytes()
			var ch *chunk
			if ch, err = p.add(kindMeta, w.s.r.crypt.id(text), text); err == nil {
				c.lists = append(c.lists, extent{c: ch})
				added = true
			}
			enc.reset()
		}
		for _, x := range c.ext {
			enc.extent(x)
			enc.count++
			if enc.count >= listMax || x.c != nil && binary.LittleEndian.Uint16(x.c.id[:])%listMean == 0 {
				cut()
			}
		}
		cut()
	})
	if err == nil && added {
		err = p.flush()
	}
	return err
}

func (g *segmenter) uses(c *chunk) {
	k := c.blk.pack
	g.live[k] += int64(c.n)
	if !g.seen[k] {
		g.seen[k] = true
		g.m.packs = append(g.m.packs, k)
	}
}

func (g *segmenter) owner(s sig) (uid, gid uint32) {
	uid, ok1 := g.w.ids.inside(s.uid)
	gid, ok2 := g.w.ids.inside(s.gid)
	if !ok1 || !ok2 {
		g.odd++
	}
	return uid, gid
}

func (g *segmenter) dir(path string, d *dir) error {
	e := entry{path: path, kind: kindDir, mode: d.sig.mode & 0o7777, mtime: d.sig.mtime, xattrs: d.xattrs}
	e.uid, e.gid = g.owner(d.sig)
	if err := g.entry(&e); err != nil {
		return err
	}
	for _, n := range d.nodes {
		if n.sub != nil && n.sub.gone {
			continue
		}
		path := join(path, n.name)
		if n.sub != nil {
			if err := g.dir(path, n.sub); err != nil {
				return err
			}
			continue
		}
		if n.kind == kindSkip {
			g.note.add(fmt.Sprintf("%q is not saved: %s", path, n.link))
			continue
		}
		e := entry{path: path, kind: n.kind, mode: n.sig.mode & 0o7777, mtime: n.sig.mtime, xattrs: n.xattrs, link: n.link}
		e.uid, e.gid = g.owner(n.sig)
		if n.kind == kindFile {
			g.file(&e, n)
		}
		if err := g.entry(&e); err != nil {
			return err
		}
	}
	return nil
}

func (g *segmenter) file(e *entry, n *node) {
	if n.sig.many {
		at := [2]uint64{n.sig.dev, n.sig.ino}
		if first, ok := g.link[at]; ok {
			e.kind, e.link = kindLink, first
			return
		}
		g.link[at] = e.path
	}
	c := n.content
	e.size, e.ext = c.size, c.ext
	g.size.extents += int64(len(c.ext))
	g.m.Bytes += c.data
	for _, x := range c.ext {
		if x.c != nil {
			g.uses(x.c)
		}
	}
	if c.lists != nil {
		e.ext, e.lists = c.lists, true
		for _, x := range c.lists {
			g.uses(x.c)
		}
	}
}

// entry adds one, and cuts where its path says so.
func (g *segmenter) entry(e *entry) error {
	g.m.Files++
	g.size.entries++
	g.size.paths += int64(len(e.path))
	if e.lists {
		g.size.extents += int64(len(e.ext)) // beside those that they hold
	}
	if err := g.size.check(); err != nil {
		return fmt.Errorf("it cannot be saved: %w", err)
	}
	g.enc.entry(e)
	if g.enc.count < segmentMin {
		return nil
	}
	if g.enc.count < segmentMax && len(g.enc.body) < segmentBytes {
		h := sha256.Sum256([]byte(e.path))
		if binary.LittleEndian.Uint16(h[:])%segmentMean != 0 {
			return nil
		}
	}
	return g.cut()
}

func (g *segmenter) cut() error {
	if g.enc.count == 0 {
		return nil
	}
	text := g.enc.bytes()
	g.enc.reset()
	if g.text += int64(len(text)); g.text > maxTree {
		return errors.New("it cannot be saved: the tree's attributes or names are too many")
	}
	if len(text) > maxSegment {
		return fmt.Errorf("a segment of %d bytes: attributes or names are too many", len(text))
	}
	c, err := g.p.add(kindMeta, g.w.s.r.crypt.id(text), text)
	if err == nil {
		g.m.segments = append(g.m.segments, c)
	}
	return err
}
