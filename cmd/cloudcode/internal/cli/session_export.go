package cli

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newSessionExportCmd() *cobra.Command {
	var at, file string
	cmd := &cobra.Command{
		Use:   "export ID",
		Short: "Write all that a session has into a tar archive",
		Long: `Write a session's files and chats, all of /root/s3 but the bucket and caches, as a tar
archive: as they are now, or as a checkpoint has them. A session that is on no node
is read from its newest checkpoint.

A file appears when it is complete, and only you can read it: chats and settings are
in it. "cloudcode session import" takes it in.`,
		Example: `  cloudcode session export main -f main.tar
  cloudcode session export main --at 20261124t2149 | zstd > main.tar.zst`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			if file == "-" && screenOf(cmd.OutOrStdout()) != nil {
				return usagef("an archive is not for terminals; redirect the output, or name a file with -f")
			}
			return withClient(cmd, func(c *client) error {
				r, about, err := c.readArchive(cmd.Context(), &cloudcodev1.ReadArchiveRequest{Name: name, Checkpoint: at})
				if err != nil {
					return err
				}
				defer r.Close()
				shown, clear := transfer(cmd, r, "exporting "+idOf(name), about)
				defer clear()
				var bytes int64
				save := func(w io.Writer) (err error) {
					bytes, err = io.Copy(w, shown)
					return err
				}
				if file == "-" {
					return save(cmd.OutOrStdout())
				}
				err = saveFile(file, save)
				clear()
				if err != nil {
					return err
				}
				switch out := cmd.OutOrStdout(); outputOf(cmd) {
				case formatJSON:
					return printValueJSON(out, map[string]any{"session": name, "file": file, "bytes": bytes})
				case formatName:
					_, err = fmt.Fprintln(out, file)
				default:
					_, err = fmt.Fprintf(out, "session %s exported to %s, %s\n", idOf(name), plain(file), formatBytes(bytes))
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&at, "at", "", "export this `CHECKPOINT` (default: as the session is now)")
	f.StringVarP(&file, "file", "f", "-", "write to `FILE`; - is stdout")
	SetEnvName(f, "at", "")
	SetEnvName(f, "file", "")
	_ = cmd.RegisterFlagCompletionFunc("at", completeCheckpoints)
	_ = cmd.MarkFlagFilename("file", "tar")
	return cmd
}

func newSessionImportCmd() *cobra.Command {
	var create bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "import ID FILE",
		Short: "Unpack a tar archive of a session into a session",
		Long: `Unpack an archive that "cloudcode session export" has made (- is stdin; gzip is
fine) into /root/s3 of a session that runs. Files of the same name are replaced,
others stay. With --create the session is made first if it does not exist; to have
it with other limits or storage, create it yourself before.`,
		Example: `  cloudcode session import copy main.tar --create
  zstd -dc main.tar.zst | cloudcode session import main -`,
		Args: args(cobra.ExactArgs(2)),
		ValidArgsFunction: func(cmd *cobra.Command, given []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(given) == 1 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return completeSessions(1)(cmd, given, word)
		},
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			if err := positive("timeout", timeout); err != nil {
				return err
			}
			archive, size := cmd.InOrStdin(), int64(0)
			if a[1] != "-" {
				f, err := os.Open(a[1])
				if err != nil {
					return usagef("%w", err)
				}
				defer f.Close()
				info, err := f.Stat()
				if err != nil || info.IsDir() {
					return usagef("%s is no archive; to copy a folder, see `cloudcode session cp`", a[1])
				}
				archive, size = f, info.Size()
			} else if interactive(archive) {
				return usagef("there is no archive on stdin; pipe one in, or name a file")
			}
			return withClient(cmd, func(c *client) error {
				if create {
					if err := c.ensureRunning(cmd, name, timeout); err != nil {
						return err
					}
				}
				shown, clear := transfer(cmd, archive, "importing "+a[1], size)
				defer clear()
				src, err := gunzipped(shown)
				if err != nil {
					return err
				}
				resp, err := c.writeArchive(cmd.Context(), name, "", src)
				clear()
				if err != nil {
					return err
				}
				switch out := cmd.OutOrStdout(); outputOf(cmd) {
				case formatJSON:
					return printJSON(out, resp)
				case formatName:
					_, err = fmt.Fprintln(out, name)
				default:
					_, err = fmt.Fprintf(out, "session %s: imported %s, %s\n", idOf(name), plural(resp.GetFiles(), "file", "files"), formatBytes(resp.GetBytes()))
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&create, "create", false, "make the session first if it does not exist, and wait until it is ready")
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "how long --create waits")
	SetEnvName(f, "create", "")
	return cmd
}

// ensureRunning makes a session unless there is one, and waits until it runs.
func (c *client) ensureRunning(cmd *cobra.Command, name string, timeout time.Duration) error {
	s, err := c.getSession(cmd.Context(), name)
	if status.Code(err) == codes.NotFound {
		s, err = c.createSession(cmd.Context(), &cloudcodev1.CreateSessionRequest{
			SessionId: idOf(name), Session: &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{}},
		})
	}
	if err != nil || s.GetState() == cloudcodev1.Session_RUNNING {
		return err
	}
	view := waitView(cmd)
	if _, err = c.waitReady(cmd.Context(), s, timeout, view, starting{}); err != nil {
		view.finish(false)
	}
	return err
}

// gunzipped returns the archive itself of one that is compressed with gzip.
func gunzipped(r io.Reader) (io.Reader, error) {
	br := bufio.NewReaderSize(r, archiveChunk)
	magic, err := br.Peek(2)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if len(magic) < 2 || magic[0] != 0x1f || magic[1] != 0x8b {
		return br, nil
	}
	z, err := gzip.NewReader(br)
	if err != nil {
		return nil, usagef("the archive is not gzip as it seemed: %w", err)
	}
	return z, nil
}
