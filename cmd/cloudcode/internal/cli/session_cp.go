package cli

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	"github.com/cloudcode-dev/cloudcode/internal/container"
)

func newSessionCopyCmd() *cobra.Command {
	var at string
	var follow bool
	cmd := &cobra.Command{
		Use:     "cp SRC DST",
		Aliases: []string{"copy"},
		Short:   "Copy files and folders into and out of a session",
		Long: `Copy a file or a folder. One of SRC and DST, or both, is ID:PATH: a path in a session,
absolute and below ` + container.StorageDir + `, or relative to the project folder
(` + container.ProjectDir + `). The other is a path on this machine, or - for a tar
archive on stdin or stdout.

A folder is copied into DST if that is there, and becomes DST if not. SRC/. copies
what is in it. Modes, times, symbolic and hard links are kept, owners are not: in a
session everything belongs to root, here to you. What is in a session is not
trusted: nothing is written outside of DST, and setuid bits are dropped.`,
		Example: `  cloudcode session cp ./data main:data
  cloudcode session cp main:report.pdf .
  cloudcode session cp main:src/. ./src --at 20261124t2149
  cloudcode session cp main:/root/s3/workspace - | tar t
  git archive HEAD | cloudcode session cp - main:repo`,
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: completeCopy,
		RunE: func(cmd *cobra.Command, a []string) error {
			src, err := parsePlace(a[0])
			if err != nil {
				return err
			}
			dst, err := parsePlace(a[1])
			if err != nil {
				return err
			}
			switch {
			case src.session == "" && dst.session == "":
				return usagef("one of SRC and DST must be in a session, as ID:PATH")
			case at != "" && src.session == "":
				return usagef("--at is for what is copied out of a session")
			case src.stdio && interactive(cmd.InOrStdin()):
				return usagef("there is no archive on stdin; pipe one in, or name a file")
			case dst.stdio && screenOf(cmd.OutOrStdout()) != nil:
				return usagef("an archive is not for terminals; redirect the output, or name a file")
			}
			return withClient(cmd, func(c *client) error {
				t := &copying{cmd: cmd, c: c, src: src, dst: dst, at: at, follow: follow}
				return t.run(cmd.Context())
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&at, "at", "", "copy out of this `CHECKPOINT` (default: as the session is now)")
	f.BoolVarP(&follow, "follow-link", "L", false, "if SRC on this machine is a symbolic link, copy what it leads to")
	SetEnvName(f, "at", "")
	_ = cmd.RegisterFlagCompletionFunc("at", func(cmd *cobra.Command, given []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(given) == 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		id, _, _ := strings.Cut(given[0], ":")
		return completeCheckpoints(cmd, []string{id}, word)
	})
	return cmd
}

// completeCopy completes sessions, as ID:, and files of this machine.
func completeCopy(cmd *cobra.Command, given []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(given) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	if strings.ContainsAny(word, "/.:") {
		return nil, cobra.ShellCompDirectiveDefault
	}
	ids, _ := completeFrom(cmd, func(ctx context.Context, c *client) ([]cobra.Completion, error) {
		all, err := c.listSessions(ctx, "")
		var out []cobra.Completion
		for _, s := range all {
			out = append(out, cobra.CompletionWithDesc(idOf(s.GetName())+":", s.GetState().String()))
		}
		return out, err
	})
	return ids, cobra.ShellCompDirectiveDefault | cobra.ShellCompDirectiveNoSpace
}

// place is one end of a copy.
type place struct {
	session string // resource name; empty: on this machine
	path    string // in a session absolute; on this machine as given
	inside  bool   // what is in the folder, not the folder itself
	folder  bool   // given with a slash at its end
	stdio   bool
}

// parsePlace reads ID:PATH, a local path or "-". As with docker cp, a path with a
// colon is local when a slash or a dot comes before it.
func parsePlace(arg string) (place, error) {
	if arg == "-" {
		return place{stdio: true}, nil
	}
	id, rest, has := strings.Cut(arg, ":")
	if !has || id == "" || strings.HasPrefix(arg, ".") || strings.Contains(id, "/") && !strings.HasPrefix(id, "sessions/") {
		if arg == "" {
			return place{}, usagef("an empty path; this folder is .")
		}
		return place{path: arg, inside: arg == "." || strings.HasSuffix(arg, "/."), folder: strings.HasSuffix(arg, "/")}, nil
	}
	name, err := sessionName(id)
	if err != nil {
		return place{}, err
	}
	p := place{session: name, folder: strings.HasSuffix(rest, "/"), inside: rest == "." || strings.HasSuffix(rest, "/.")}
	if p.path = rest; !path.IsAbs(rest) {
		p.path = path.Join(container.ProjectDir, rest)
	}
	p.path = path.Clean(p.path)
	if p.path != container.StorageDir && !strings.HasPrefix(p.path, container.StorageDir+"/") {
		return place{}, usagef("%s: only what is below %s can be copied", arg, container.StorageDir)
	}
	return p, nil
}

// asked is the path as the API takes it: all of /root/s3 is the empty one.
func (p place) asked() string {
	if p.path == container.StorageDir {
		return ""
	}
	return p.path
}

// copying is one run of cp.
type copying struct {
	cmd      *cobra.Command
	c        *client
	src, dst place
	at       string
	follow   bool
}

func (t *copying) run(ctx context.Context) error {
	switch {
	case t.src.session != "" && t.dst.session != "":
		return t.between(ctx)
	case t.src.session != "":
		return t.out(ctx)
	}
	return t.in(ctx)
}

// open opens the archive of the source in a session.
func (t *copying) open(ctx context.Context) (io.Reader, func(), error) {
	r, about, err := t.c.readArchive(ctx, &cloudcodev1.ReadArchiveRequest{Name: t.src.session, Path: t.src.asked(), Checkpoint: t.at})
	if err != nil {
		return nil, nil, err
	}
	shown, clear := transfer(t.cmd, r, "copying "+path.Base(t.src.path), about)
	return shown, func() { clear(); _ = r.Close() }, nil
}

// strip takes the name of the source itself from the front of an entry's name,
// "." being the source. Only an archive of all has nothing there.
func (t *copying) strip(name string) (string, bool) {
	if t.src.asked() == "" {
		return name, true
	}
	base := path.Base(t.src.path)
	if name == base {
		return ".", true
	}
	return strings.CutPrefix(name, base+"/")
}

// out copies from a session to this machine.
func (t *copying) out(ctx context.Context) error {
	r, done, err := t.open(ctx)
	if err != nil {
		return err
	}
	defer done()
	if t.dst.stdio {
		if _, err := io.Copy(t.cmd.OutOrStdout(), r); err != nil {
			return fmt.Errorf("copy to stdout: %w", err)
		}
		return nil
	}
	// What the source is says its first entry.
	tr := newPeeked(r)
	isFolder, err := tr.folder(t.src.asked() == "")
	if err != nil {
		return err
	}
	u := &unpacker{}
	target := filepath.Clean(t.dst.path)
	info, statErr := os.Stat(target)
	exists := statErr == nil && info.IsDir()
	switch {
	case isFolder && statErr == nil && !exists:
		return usagef("%s is a file; a folder cannot take its place", t.dst.path)
	case isFolder:
		if exists && !t.src.inside {
			target = filepath.Join(target, path.Base(t.src.path))
		}
		if err := os.MkdirAll(target, 0o777); err != nil {
			return usagef("%w", err)
		}
		u.rename = t.strip
	case t.src.inside:
		return usagef("%s is no folder", t.src.path)
	default:
		name := path.Base(t.src.path)
		switch {
		case exists:
		case t.dst.folder:
			return usagef("there is no folder %s", t.dst.path)
		default:
			name, target = filepath.Base(target), filepath.Dir(target)
		}
		u.one = true
		u.rename = func(entry string) (string, bool) {
			if entry, ok := t.strip(entry); !ok || entry != "." {
				return entry, ok
			}
			return name, true
		}
	}
	if u.root, err = os.OpenRoot(target); err != nil {
		return usagef("%w", err)
	}
	defer u.root.Close()
	if err := u.unpack(tr); err != nil {
		return err
	}
	done()
	t.noteSkipped(u.skipped)
	return t.report(u.files, u.bytes, t.dst.path)
}

// in copies from this machine into a session.
func (t *copying) in(ctx context.Context) error {
	if t.src.stdio {
		r, clear := transfer(t.cmd, t.cmd.InOrStdin(), "copying stdin", 0)
		defer clear()
		resp, err := t.c.writeArchive(ctx, t.dst.session, t.dst.asked(), r)
		clear()
		if err != nil {
			return err
		}
		return t.report(resp.GetFiles(), resp.GetBytes(), t.dst.path)
	}
	source := filepath.Clean(t.src.path)
	info, err := os.Lstat(source)
	if err == nil && info.Mode()&fs.ModeSymlink != 0 && (t.follow || t.src.folder || t.src.inside) {
		if source, err = filepath.EvalSymlinks(source); err == nil {
			info, err = os.Lstat(source)
		}
	}
	switch {
	case err != nil:
		return usagef("%w", err)
	case (t.src.folder || t.src.inside) && !info.IsDir():
		return usagef("%s is no folder", t.src.path)
	}
	// The name of what is asked for, also where a link leads elsewhere.
	base, err := filepath.Abs(t.src.path)
	if err != nil {
		return err
	}
	folder, name, err := t.target(ctx, filepath.Base(base), info.IsDir())
	if err != nil {
		return err
	}
	about := treeSize(source)
	pr, pw := io.Pipe()
	p := &packer{}
	packed := make(chan struct{})
	go func() {
		defer close(packed)
		_ = pw.CloseWithError(p.pack(ctx, pw, source, name))
	}()
	defer func() { _ = pr.Close(); <-packed }()
	r, clear := transfer(t.cmd, pr, "copying "+filepath.Base(base), about)
	defer clear()
	resp, err := t.c.writeArchive(ctx, t.dst.session, folder, r)
	clear()
	if err != nil {
		return err
	}
	<-packed
	t.noteSkipped(p.skipped)
	return t.report(resp.GetFiles(), resp.GetBytes(), t.dst.path)
}

// target says into which folder of the destination's session a source of that
// name is unpacked, and under which name ("." for what is in it).
func (t *copying) target(ctx context.Context, base string, isFolder bool) (folder, name string, err error) {
	if isFolder && t.src.inside {
		return t.dst.asked(), ".", nil
	}
	there, isDir := true, true
	if !t.dst.folder && !t.dst.inside && t.dst.asked() != "" && t.dst.path != container.ProjectDir {
		if there, isDir, err = t.c.lookAt(ctx, t.dst); err != nil {
			return "", "", err
		}
	}
	switch {
	case there && isDir:
		return t.dst.asked(), base, nil
	case there && isFolder:
		return "", "", usagef("%s is a file; a folder cannot take its place", t.dst.path)
	}
	parent := t.dst
	parent.path = path.Dir(t.dst.path)
	return parent.asked(), path.Base(t.dst.path), nil
}

// lookAt finds out what is at a path: the first entry of its archive says it.
func (c *client) lookAt(ctx context.Context, p place) (there, isFolder bool, err error) {
	r, _, err := c.readArchive(ctx, &cloudcodev1.ReadArchiveRequest{Name: p.session, Path: p.asked()})
	if status.Code(err) == codes.NotFound {
		if _, gone := c.getSession(ctx, p.session); gone != nil {
			return false, false, gone
		}
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	defer r.Close()
	isFolder, err = newPeeked(r).folder(false)
	return true, isFolder, err
}

// between copies from one session into another (or the same).
func (t *copying) between(ctx context.Context) error {
	r, done, err := t.open(ctx)
	if err != nil {
		return err
	}
	defer done()
	tr := newPeeked(r)
	isFolder, err := tr.folder(t.src.asked() == "")
	if err != nil {
		return err
	}
	if t.src.inside && !isFolder {
		return usagef("%s is no folder", t.src.path)
	}
	folder, name, err := t.target(ctx, path.Base(t.src.path), isFolder)
	if err != nil {
		return err
	}
	pr, pw := io.Pipe()
	renamed := make(chan struct{})
	go func() {
		defer close(renamed)
		_ = pw.CloseWithError(renameTar(pw, tr, func(entry string) (string, bool) {
			rest, ok := t.strip(entry)
			return path.Join(name, rest), ok
		}))
	}()
	defer func() { _ = pr.Close(); <-renamed }()
	resp, err := t.c.writeArchive(ctx, t.dst.session, folder, pr)
	done()
	if err != nil {
		return err
	}
	return t.report(resp.GetFiles(), resp.GetBytes(), t.dst.path)
}

// renameTar copies a tar archive with other names in it.
func renameTar(w io.Writer, r io.Reader, rename func(string) (string, bool)) error {
	tr, tw := tar.NewReader(r), tar.NewWriter(w)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return tw.Close()
		}
		if err != nil {
			return err
		}
		name, err := entryName(h.Name)
		if err != nil {
			return err
		}
		var ok bool
		if h.Name, ok = rename(name); !ok {
			continue
		}
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
		}
		if h.Typeflag == tar.TypeLink {
			if h.Linkname, err = entryName(h.Linkname); err != nil {
				return err
			}
			if h.Linkname, ok = rename(h.Linkname); !ok {
				return fmt.Errorf("%s is a hard link to what is not copied", h.Name)
			}
		}
		h.Format = tar.FormatPAX
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return err
		}
	}
}

func (t *copying) noteSkipped(skipped []string) {
	for _, name := range skipped {
		fmt.Fprintf(t.cmd.ErrOrStderr(), "  left out %s: it is no file, folder or link\n", plain(name))
	}
}

func (t *copying) report(files, bytes int64, where string) error {
	switch out := t.cmd.OutOrStdout(); outputOf(t.cmd) {
	case formatJSON:
		return printJSON(out, &cloudcodev1.WriteArchiveResponse{Files: files, Bytes: bytes})
	case formatName:
		return nil
	default:
		if t.dst.session != "" {
			where = idOf(t.dst.session) + ":" + where
		}
		_, err := fmt.Fprintf(out, "copied %s, %s to %s\n", plural(files, "file", "files"), formatBytes(bytes), plain(where))
		return err
	}
}

// treeSize is about how large an archive of it will be.
func treeSize(source string) int64 {
	var n int64
	_ = filepath.WalkDir(source, func(_ string, d fs.DirEntry, err error) error {
		n += 1536 // a header with times in it
		if err == nil && d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				n += (info.Size() + 511) &^ 511
			}
		}
		return nil
	})
	return n
}

// peeked is an archive whose first header can be seen before it is read.
type peeked struct {
	io.Reader
	source io.Reader
}

func newPeeked(r io.Reader) *peeked { return &peeked{Reader: r, source: r} }

// folder reports whether the archive is of a folder; one of all is.
func (p *peeked) folder(all bool) (bool, error) {
	if all {
		return true, nil
	}
	var seen strings.Builder
	h, err := tar.NewReader(io.TeeReader(p.source, &seen)).Next()
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("the server has sent an empty archive")
		}
		return false, fmt.Errorf("read the archive: %w", err)
	}
	p.Reader = io.MultiReader(strings.NewReader(seen.String()), p.source)
	return h.Typeflag == tar.TypeDir, nil
}
