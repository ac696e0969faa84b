package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudcode-dev/cloudcode/image"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// containerdFile is where a node daemon says which containerd it uses.
const containerdFile = "node/containerd.address"

func newImageCmd() *cobra.Command {
	cmd := newGroup("image", "Build and import what sessions run from")
	cmd.GroupID = GroupFleet
	cmd.AddCommand(newImageBuildCmd(), newImageImportCmd(), newImageListCmd())
	return cmd
}

func newImageBuildCmd() *cobra.Command {
	var o image.BuildOptions
	var file string
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Build the session image as an OCI archive, without Docker",
		Long: `Build the image that sessions run from: Debian, Python, Node.js, git and OpenCode.
It needs root, mmdebstrap and npm, takes about a minute the first time, and is
reproducible: the same packages give the same digest.

On a node, "cloudcode image import" takes the archive in.`,
		Example: `  sudo cloudcode image build --file session.tar
  sudo cloudcode image import session.tar`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			view := cmd.ErrOrStderr()
			o.Progress = func(p image.Progress) {
				fmt.Fprintf(view, "%6s  %-12s %s\n", short(p.Elapsed), p.Phase, oneLine(p.Line))
			}
			res, err := image.Build(cmd.Context(), o)
			if err != nil {
				return explainBuild(cmd.Context(), err)
			}
			path := res.Path
			if file != "" {
				if err := res.CopyTo(file); err != nil {
					return fmt.Errorf("--file: %w", err)
				}
				path = file
			}
			return printBuilt(cmd, res, path)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Ref, "ref", image.DefaultRef, "name of the image")
	f.StringVarP(&file, "file", "f", "", "also write the archive here (default: it stays in the cache)")
	f.StringVar(&o.CacheDir, "cache-dir", "", "where finished layers are kept, about 500 MB (default: cloudcode/image in the user's cache folder)")
	f.StringArrayVar(&o.Mirrors, "mirror", nil, "Debian mirror, an address or a sources.list line, as for mmdebstrap; can be repeated")
	f.StringVar(&o.Cloudflared, "with-cloudflared", "", "cloudflared's binary: a file, a folder that holds it, or an http(s) address (default: the image has none)")
	f.BoolVar(&o.NoCache, "no-cache", false, "build every layer again, for newer packages")
	_ = cmd.MarkFlagFilename("file", "tar")
	_ = cmd.MarkFlagDirname("cache-dir")
	return cmd
}

func explainBuild(ctx context.Context, err error) error {
	e := &Error{Code: "FAILED_PRECONDITION", Msg: oneLine(err.Error()), Exit: exitError, Err: err}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, image.ErrNotRoot):
		e.Reason, e.Exit = "NOT_ROOT", exitDenied
	case errors.Is(err, image.ErrMissingTool):
		e.Reason = "MISSING_TOOL"
	case errors.Is(err, image.ErrPlatform):
		e.Reason = "PLATFORM"
	default:
		e.Code = "UNKNOWN"
	}
	return e
}

func printBuilt(cmd *cobra.Command, res image.Result, path string) error {
	out := cmd.OutOrStdout()
	switch outputOf(cmd) {
	case formatJSON:
		type layer struct {
			Name     string `json:"name"`
			Digest   string `json:"digest"`
			Size     int64  `json:"size"`
			Unpacked int64  `json:"unpacked"`
			Cached   bool   `json:"cached"`
		}
		layers := make([]layer, 0, len(res.Layers))
		for _, l := range res.Layers {
			layers = append(layers, layer{string(l.Name), l.Digest, l.Size, l.Unpacked, l.Cached})
		}
		return printValueJSON(out, map[string]any{
			"ref": res.Ref, "digest": res.Digest, "path": path, "size": res.Size, "cached": res.Cached,
			"seconds": res.Took.Seconds(), "layers": layers, "leftOut": append([]string{}, res.LeftOut...),
		})
	case formatName:
		_, err := fmt.Fprintln(out, res.Ref)
		return err
	}
	took := short(res.Took)
	if res.Cached {
		took += ", all from the cache"
	}
	return printFields(out, []field{
		{"Image", res.Ref},
		{"Digest", res.Digest},
		{"Archive", path},
		{"Size", formatBytes(res.Size)},
		{"Took", took},
		{"Left out", strings.Join(res.LeftOut, "\n")},
	})
}

func newImageImportCmd() *cobra.Command {
	var name, address string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Bring an OCI or Docker archive to this node",
		Long:  `Read an image archive (- is stdin) into the containerd of the node daemon on this machine.`,
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			archive := cmd.InOrStdin()
			var size int64
			if a[0] != "-" {
				f, err := os.Open(a[0])
				if err != nil {
					return usagef("%w", err)
				}
				defer f.Close()
				if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
					size = info.Size()
				}
				archive = f
			}
			return withImages(cmd, address, func(store imageStore) error {
				view := newTransferView(cmd.ErrOrStderr())
				defer view.clear()
				img, err := store.ImportImage(cmd.Context(), view.reader(archive, "reading "+a[0], size), name, func(p runtime.Progress) {
					view.show(p.Detail, p.Current, p.Total)
				})
				view.clear()
				if err != nil {
					return err
				}
				return printImages(cmd, []runtime.Image{img}, true)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "name that the image gets (default: as the archive says)")
	containerdFlag(cmd, &address)
	return cmd
}

func newImageListCmd() *cobra.Command {
	var address string
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the images that can start on this node without a pull",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withImages(cmd, address, func(store imageStore) error {
				list, err := store.Images(cmd.Context())
				if err != nil {
					return err
				}
				slices.SortFunc(list, func(a, b runtime.Image) int { return strings.Compare(a.Name, b.Name) })
				return printImages(cmd, list, false)
			})
		},
	}
	containerdFlag(cmd, &address)
	return cmd
}

func containerdFlag(cmd *cobra.Command, address *string) {
	cmd.Flags().StringVar(address, "containerd-address", "", "containerd's socket (default: that of the node daemon on this machine)")
	_ = cmd.MarkFlagFilename("containerd-address")
}

// withImages runs fn with the images of this node.
func withImages(cmd *cobra.Command, address string, fn func(imageStore) error) error {
	if address == "" {
		var err error
		if address, err = readLine(filepath.Join(DataDir(cmd), containerdFile)); err != nil {
			return noContainerd(err)
		}
	}
	address = strings.TrimPrefix(address, "unix://")
	if _, err := os.Stat(address); err != nil {
		return noContainerd(err)
	}
	store, err := openImages(cmd.Context(), address)
	if err != nil {
		return explainImages(cmd.Context(), err)
	}
	defer store.Close()
	return explainImages(cmd.Context(), fn(store))
}

func noContainerd(err error) error {
	e := &Error{
		Code: "UNAVAILABLE", Reason: "NO_CONTAINERD", Exit: exitUnavailable, Err: err,
		Msg:  "no containerd of a node was found on this machine: " + oneLine(err.Error()),
		Hint: "start the node with `cloudcode up` or `cloudcode nodeagent`, or name a socket with --containerd-address",
	}
	if errors.Is(err, fs.ErrPermission) {
		e.Code, e.Reason, e.Exit = "PERMISSION_DENIED", "NOT_ROOT", exitDenied
		e.Msg, e.Hint = "the node's containerd is root's: "+oneLine(err.Error()), "use sudo"
	}
	return e
}

func explainImages(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, runtime.ErrUnavailable):
		return noContainerd(err)
	case errors.Is(err, runtime.ErrInvalidSpec):
		return &Error{Code: "INVALID_ARGUMENT", Msg: oneLine(err.Error()), Exit: exitUsage, Err: err}
	}
	// Not a gRPC status to be explained as the server's: it is containerd's.
	return &Error{Code: "UNKNOWN", Msg: oneLine(err.Error()), Exit: exitError, Err: err}
}

func printImages(cmd *cobra.Command, list []runtime.Image, one bool) error {
	out := cmd.OutOrStdout()
	type imageJSON struct {
		Name       string    `json:"name"`
		Digest     string    `json:"digest"`
		SizeBytes  int64     `json:"sizeBytes"`
		CreateTime time.Time `json:"createTime"`
	}
	images := make([]imageJSON, 0, len(list))
	rows := make([][]string, 0, len(list))
	for _, i := range list {
		images = append(images, imageJSON{i.Name, i.Digest, i.SizeBytes, i.CreatedAt.UTC()})
		rows = append(rows, []string{i.Name, shortDigest(i.Digest), formatBytes(i.SizeBytes), age(now(), timestamppb.New(i.CreatedAt))})
	}
	switch o := outputOf(cmd); {
	case o == formatJSON && one:
		return printValueJSON(out, images[0])
	case o == formatJSON:
		return printValueJSON(out, map[string]any{"images": images})
	case o == formatName:
		for _, i := range list {
			fmt.Fprintln(out, i.Name)
		}
		return nil
	case len(list) == 0:
		fmt.Fprintln(cmd.ErrOrStderr(), "no images; make one with `cloudcode image build`, then `cloudcode image import`")
		return nil
	}
	return printTable(out, []string{"IMAGE", "DIGEST", "SIZE", "AGE"}, rows)
}

func shortDigest(d string) string {
	if hash, ok := strings.CutPrefix(d, "sha256:"); ok && len(hash) > 12 {
		return "sha256:" + hash[:12]
	}
	return d
}

// transferView shows bytes on one live line; elsewhere a line when the step changes.
type transferView struct {
	mu    sync.Mutex // containerd's client may read from a goroutine of its own
	w     io.Writer
	scr   screen
	last  string
	at    time.Time
	drawn bool
}

func newTransferView(w io.Writer) *transferView { return &transferView{w: w, scr: screenOf(w)} }

func (v *transferView) show(text string, done, total int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	text = oneLine(text)
	changed := text != v.last
	v.last = text
	if v.scr == nil {
		if changed {
			fmt.Fprintln(v.w, text)
		}
		return
	}
	if !changed && time.Since(v.at) < 100*time.Millisecond {
		return
	}
	v.at = time.Now()
	v.erase()
	line := strings.TrimSpace(bar(done, total, 20) + "  " + text)
	width := v.scr.Width()
	if width <= 0 {
		width = 80
	}
	fmt.Fprint(v.w, shorten(line, width-1))
	v.drawn = true
}

func (v *transferView) clear() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.erase()
}

func (v *transferView) erase() {
	if v.drawn {
		fmt.Fprint(v.w, "\r\x1b[K")
		v.drawn = false
	}
}

// reader shows how much of r was read.
func (v *transferView) reader(r io.Reader, text string, total int64) io.Reader {
	return &shownReader{r: r, view: v, text: text, total: total}
}

type shownReader struct {
	r           io.Reader
	view        *transferView
	text        string
	done, total int64
}

func (s *shownReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.done += int64(n)
	s.view.show(s.text, s.done, s.total)
	return n, err
}
