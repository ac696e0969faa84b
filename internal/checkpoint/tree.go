package checkpoint

import (
	"time"

	"golang.org/x/sys/unix"
)

// sig is what tells that a file did not change, without reading it. The change
// time cannot be set by who owns the file.
type sig struct {
	dev, ino     uint64
	size         int64
	mtime, ctime int64 // ns
	mode         uint32
	uid, gid     uint32
	many         bool // it has further names
}

func sigOf(st *unix.Stat_t) sig {
	return sig{
		dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano(),
		mode: st.Mode, uid: st.Uid, gid: st.Gid, many: st.Nlink > 1 && st.Mode&unix.S_IFMT == unix.S_IFREG,
	}
}

// tick is more than one step of the clock that stamps files: a file stamped less
// than that ago may change again and keep its stamp, and is read again next time.
const tick = 20 * time.Millisecond

func (s sig) racy() bool { return s.ctime > time.Now().Add(-tick).UnixNano() }

const kindSkip = 's' // not saved; link says why

// node is one name in the writer's picture of the tree. It is replaced, not changed,
// but for content, which is put in once it is there.
type node struct {
	name    string
	sig     sig
	racy    bool
	kind    byte
	link    string
	xattrs  []xattr
	content *content // of a file; nil: not read
	sub     *dir     // of a folder; its sig is there
}

// content of a file, shared by its names.
type content struct {
	size  int64
	data  int64 // without holes
	ext   []extent
	lists []extent // ext as lists, where they are many
}

func (c *content) usable() bool {
	for _, x := range c.ext {
		if x.c != nil && !x.c.usable() {
			return false
		}
	}
	return true
}

// dir is a folder in the writer's picture of the tree.
type dir struct {
	sig    sig
	racy   bool
	whole  bool // nodes are all there is, as of sig
	gone   bool // it vanished between its folder's listing and its own
	xattrs []xattr
	nodes  []*node // by name
}

// each calls f for all nodes below d.
func (d *dir) each(f func(n *node)) {
	for _, n := range d.nodes {
		f(n)
		if n.sub != nil {
			n.sub.each(f)
		}
	}
}
