package cli

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cloudcode-dev/cloudcode/internal/auth"
)

func newVersionCmd(version string) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := map[string]string{"version": version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH}
			if info, ok := debug.ReadBuildInfo(); ok {
				for _, s := range info.Settings {
					switch s.Key {
					case "vcs.revision":
						v["commit"] = s.Value
					case "vcs.time":
						v["commitTime"] = s.Value
					case "vcs.modified":
						v["modified"] = s.Value
					}
				}
			}
			if outputOf(cmd) == formatJSON {
				return printValueJSON(cmd.OutOrStdout(), v)
			}
			commit := v["commit"]
			if v["modified"] == "true" {
				commit += " (modified)"
			}
			return printFields(cmd.OutOrStdout(), []field{
				{"cloudcode", v["version"]}, {"commit", commit}, {"built with", v["go"] + " " + v["platform"]},
			})
		},
	}
}

func newAuthCmd() *cobra.Command {
	cmd := newGroup("auth", "Help with credentials")
	cmd.AddCommand(&cobra.Command{
		Use:   "hash-password",
		Short: "Hash a password for SERVER_PASSWORD",
		Long: `Read a password from stdin and print its argon2id hash, which the server and the
gateway accept as SERVER_PASSWORD. In a shell, put the hash in single quotes: it
contains $.`,
		Example: `  export SERVER_PASSWORD="$(cloudcode auth hash-password < password.txt)"`,
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			password, err := readPassword(cmd)
			if err != nil {
				return err
			}
			if password == "" {
				return usagef("the password is empty; give it on stdin")
			}
			hash, err := auth.HashPassword(password)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), hash)
			return err
		},
	})
	return cmd
}

// readPassword reads one line; from a terminal without showing it, and twice.
func readPassword(cmd *cobra.Command) (string, error) {
	f, ok := cmd.InOrStdin().(interface{ Fd() uintptr })
	if !ok || !term.IsTerminal(int(f.Fd())) {
		data, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), 64<<10))
		line, _, _ := bytes.Cut(data, []byte("\n"))
		return string(bytes.TrimSuffix(line, []byte("\r"))), err
	}
	var typed [2][]byte
	for i, prompt := range []string{"Password: ", "Again: "} {
		fmt.Fprint(cmd.ErrOrStderr(), prompt)
		var err error
		typed[i], err = term.ReadPassword(int(f.Fd()))
		fmt.Fprintln(cmd.ErrOrStderr())
		if err != nil {
			return "", err
		}
	}
	if !bytes.Equal(typed[0], typed[1]) {
		return "", usagef("the two passwords differ")
	}
	return string(typed[0]), nil
}
